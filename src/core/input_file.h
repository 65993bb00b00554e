// A file read at any place by any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "core/descriptor_cache.h"

namespace mcore_bridge {

/// Reads with pread, so that a file that shrinks or a failing disk is an error and never a signal, and memory in use
/// does not depend on the file's size. All input files together keep at most 64 descriptors open; a file that is opened
/// again must still be the one it was.
class InputFile {
 public:
  /// FileNotFoundError or IoError; ValueError when it is no regular file.
  explicit InputFile(std::string path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }
  /// All bytes this object has read so far.
  uint64_t bytes_read() const { return bytes_read_; }

  /// Bytes [offset, offset + bytes) into `to`. IoError when the file cannot be read or has become shorter.
  void read(uint64_t offset, void* to, uint64_t bytes) const;
  /// `rows` pieces of `piece` bytes, `stride` bytes apart in the file and one after the other in `to`.
  void read_strided(uint64_t offset, uint64_t stride, uint64_t rows, uint64_t piece, void* to) const;
  /// Tells the kernel what will be read next. Only advice.
  void will_need(uint64_t offset, uint64_t bytes) const;

 private:
  std::shared_ptr<const Descriptor> open() const;
  std::string path_;
  uint64_t key_, size_ = 0, device_ = 0, inode_ = 0;
  int64_t modified_ns_ = 0;
  mutable std::atomic<uint64_t> bytes_read_ = 0;
};

}  // namespace mcore_bridge
