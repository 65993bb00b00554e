// One safetensors file. Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON
// header, data). Every field is checked when the file is opened; nothing of the data is read.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "bridge/header_parser.h"
#include "core/input_file.h"

namespace mcore_bridge {

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
