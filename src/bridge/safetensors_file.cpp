#include "bridge/safetensors_file.h"

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

constexpr uint64_t kLongestHeader = 100'000'000;  // as the reference implementation

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : input_(path) {
  const auto size = input_.size();
  MCB_CHECK(size >= 8, path, ": ", size, " bytes are too short for a safetensors file");
  uint64_t length = 0;
  input_.read(0, &length, 8);
  MCB_CHECK(length <= kLongestHeader, path, ": a header of ", length,
            " bytes is too long for a safetensors file (limit ", kLongestHeader, ")");
  MCB_CHECK(length <= size - 8, path, ": the header has ", length, " bytes, the file ends after ", size - 8,
            " (truncated?)");
  std::string header(length, '\0');
  input_.read(8, header.data(), length);
  data_ = 8 + length;
  entries_ = parse_safetensors_header(header, size - data_, path);
}

}  // namespace mcore_bridge
