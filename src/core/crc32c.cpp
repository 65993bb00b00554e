#include "core/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

// Polynomials are kept bit-reversed: the highest bit is the coefficient of x^0.

namespace mcore_bridge {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;
constexpr uint32_t kOne = 0x80000000;

constexpr uint32_t times_x(uint32_t value) { return value & 1 ? (value >> 1) ^ kPolynomial : value >> 1; }

constexpr uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = kOne; bit != 0; bit >>= 1) {
    if (a & bit) product ^= b;
    b = times_x(b);
  }
  return product;
}

/// x^(8 * bytes): what appending that many zero bytes multiplies a remainder by.
uint32_t shift(uint64_t bytes) {
  static constexpr auto kSquares = [] {  // x^8, x^16, x^32, ...
    std::array<uint32_t, 64> squares{};
    squares[0] = kOne;
    for (int i = 0; i < 8; ++i) squares[0] = times_x(squares[0]);
    for (size_t i = 1; i < squares.size(); ++i) squares[i] = multiply(squares[i - 1], squares[i - 1]);
    return squares;
  }();
  uint32_t result = kOne;
  for (int i = 0; bytes != 0; bytes >>= 1, ++i) {
    if (bytes & 1) result = multiply(result, kSquares[static_cast<size_t>(i)]);
  }
  return result;
}

uint32_t update_portable(uint32_t state, const unsigned char* data, size_t bytes) {
  // Slicing by eight: table k holds the remainder of a byte followed by k zero bytes.
  static const auto kTables = [] {
    std::array<std::array<uint32_t, 256>, 8> tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t value = byte;
      for (int i = 0; i < 8; ++i) value = times_x(value);
      tables[0][byte] = value;
    }
    for (size_t k = 1; k < 8; ++k) {
      for (size_t byte = 0; byte < 256; ++byte) {
        const auto before = tables[k - 1][byte];
        tables[k][byte] = (before >> 8) ^ tables[0][before & 255];
      }
    }
    return tables;
  }();
  for (; bytes >= 8; data += 8, bytes -= 8) {
    uint32_t next = 0;
    for (size_t i = 0; i < 8; ++i) {
      const auto mixed = static_cast<unsigned char>(data[i] ^ (i < 4 ? state >> (8 * i) & 255 : 0));
      next ^= kTables[7 - i][mixed];
    }
    state = next;
  }
  for (; bytes > 0; ++data, --bytes) state = (state >> 8) ^ kTables[0][(state ^ *data) & 255];
  return state;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t update_sse42(uint32_t state, const unsigned char* data, size_t bytes) {
  uint64_t wide = state;
  for (; bytes >= 8; data += 8, bytes -= 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  auto narrow = static_cast<uint32_t>(wide);
  for (; bytes > 0; ++data, --bytes) narrow = _mm_crc32_u8(narrow, *data);
  return narrow;
}
#endif

uint32_t update(uint32_t state, const void* data, size_t bytes) {
  const auto* from = static_cast<const unsigned char*>(data);
#if defined(__x86_64__)
  static const bool fast = __builtin_cpu_supports("sse4.2");
  if (fast) return update_sse42(state, from, bytes);
#endif
  return update_portable(state, from, bytes);
}

}  // namespace

uint32_t crc32c(const void* data, size_t bytes) { return ~update(~0U, data, bytes); }

void Crc32cPart::add_rows(uint64_t offset, uint64_t stride, uint64_t rows, uint64_t piece, const void* data) {
  if (rows == 0 || piece == 0) return;
  const auto* from = static_cast<const unsigned char*>(data);
  // Horner's scheme over the rows: each moves the ones before it one stride further from the end.
  uint32_t sum = update(0, from, piece);
  if (rows > 1) {
    const auto step = shift(stride);
    for (uint64_t row = 1; row < rows; ++row) sum = multiply(step, sum) ^ update(0, from + row * piece, piece);
  }
  const auto end = offset + (rows - 1) * stride + piece;
  part_ ^= multiply(shift(size_ - end), sum);
}

uint32_t Crc32cPart::value() const { return ~(part_ ^ multiply(shift(size_), ~0U)); }

}  // namespace mcore_bridge
