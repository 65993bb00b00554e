// libFuzzer target: the parsers of safetensors headers and indices. Input that begins with '{' is an index, anything
// else a safetensors file. Whatever the bytes, the answer is a value or an mcore_bridge::Error.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "bridge/header_parser.h"
#include "mcore_bridge/error.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

void parse_file(const uint8_t* data, size_t size) {
  uint64_t length = 0;
  if (size < 8) return;
  std::memcpy(&length, data, 8);
  if (length > size - 8) return;
  const uint64_t data_bytes = size - 8 - length;
  const std::string header(reinterpret_cast<const char*>(data) + 8, length);
  uint64_t covered = 0;
  for (const auto& [name, entry] : mcore_bridge::parse_safetensors_header(header, data_bytes, "file")) {
    require(entry.begin <= entry.end && entry.end <= data_bytes);
    covered += entry.end - entry.begin;
    for (const auto extent : entry.shape) require(extent >= 0);
  }
  require(covered == data_bytes);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    if (size > 0 && data[0] == '{') {
      const std::string text(reinterpret_cast<const char*>(data), size);
      for (const auto& [name, file] : mcore_bridge::parse_index(text, "index"))
        require(!file.empty() && file.find('/') == std::string::npos);
    } else {
      parse_file(data, size);
    }
  } catch (const mcore_bridge::Error&) {
  }
  return 0;
}
