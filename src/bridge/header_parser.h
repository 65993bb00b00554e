// What a safetensors header and a checkpoint's index say: parsers of untrusted text, without files.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace mcore_bridge {

struct SafetensorsEntry {
  c10::ScalarType dtype = c10::ScalarType::Undefined;  ///< Undefined: torch has none for dtype_name
  std::string dtype_name;                              ///< as in the file, e.g. "BF16"
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  ///< bytes, from the start of the data
};

/// Throws ValueError with the file's path and what is wrong with its header. The tensors cover the file's `data_bytes`
/// without gap or overlap.
std::map<std::string, SafetensorsEntry> parse_safetensors_header(const std::string& header, uint64_t data_bytes,
                                                                 const std::string& path);

/// weight_map of an index: tensor name -> file name, which has no folder in it. ValueError otherwise.
std::map<std::string, std::string> parse_index(const std::string& text, const std::string& path);

/// "F32", "BF16", ... of a dtype this engine writes.
const char* safetensors_dtype(c10::ScalarType dtype);

}  // namespace mcore_bridge
