// One safetensors file. Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON
// header, data). Every field is checked when the file is opened; nothing of the data is read.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/input_file.h"

namespace mcore_bridge {

struct SafetensorsEntry {
  c10::ScalarType dtype = c10::ScalarType::Undefined;
  std::string dtype_name;  ///< as in the file, e.g. "BF16"
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  ///< bytes, from the start of the data
};

/// Throws ValueError with the file's path and what is wrong with its header.
std::map<std::string, SafetensorsEntry> parse_safetensors_header(const std::string& header, uint64_t data_bytes,
                                                                 const std::string& path);

/// "F32", "BF16", ... of a dtype this engine writes.
const char* safetensors_dtype(c10::ScalarType dtype);

class SafetensorsFile {
 public:
  /// FileNotFoundError, IoError, or ValueError for a malformed file.
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return input_.path(); }
  const std::map<std::string, SafetensorsEntry>& entries() const { return entries_; }
  const InputFile& input() const { return input_; }
  /// Where an entry's data starts, from the start of the file.
  uint64_t offset(const SafetensorsEntry& entry) const { return data_ + entry.begin; }
  /// Bytes read so far, the header not counted.
  uint64_t data_bytes_read() const { return input_.bytes_read() - data_; }

 private:
  InputFile input_;
  uint64_t data_ = 0;  ///< where the data starts
  std::map<std::string, SafetensorsEntry> entries_;
};

}  // namespace mcore_bridge
