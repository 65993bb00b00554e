// CRC-32C (Castagnoli; RFC 3720, appendix B.4) of a file that is written in pieces, in any order and by any rank.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mcore_bridge {

/// The CRC of a whole message, as every tool computes it (initial value and final XOR of all ones).
uint32_t crc32c(const void* data, size_t bytes);

/// The part of a message's CRC that some of its bytes make. A CRC is linear over GF(2): parts of disjoint pieces are
/// combined by XOR, whoever computed them; bytes that no piece covers count as zero.
class Crc32cPart {
 public:
  /// `message_bytes`: length of the whole message.
  explicit Crc32cPart(uint64_t message_bytes) : size_(message_bytes) {}
  /// Bytes [offset, offset + bytes) of the message.
  void add(uint64_t offset, const void* data, uint64_t bytes) { add_rows(offset, bytes, 1, bytes, data); }
  /// `rows` pieces of `piece` bytes that lie `stride` apart in the message and one after the other in `data`.
  void add_rows(uint64_t offset, uint64_t stride, uint64_t rows, uint64_t piece, const void* data);
  void combine(uint32_t part) { part_ ^= part; }
  uint32_t part() const { return part_; }
  /// The CRC of the message, once the parts of all its bytes are combined.
  uint32_t value() const;

 private:
  uint64_t size_;
  uint32_t part_ = 0;
};

}  // namespace mcore_bridge
