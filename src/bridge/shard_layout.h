// Which tensor goes where in which file: decided from names, shapes and dtypes alone, before any data.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace mcore_bridge {

/// A tensor as a file holds it.
struct StoredTensor {
  std::string name;
  std::vector<int64_t> shape;
  c10::ScalarType dtype = c10::ScalarType::Undefined;
  uint64_t bytes() const;
};

struct ShardFile {
  std::string name;
  std::string header;  ///< the length bytes and the padded JSON: what the file starts with
  uint64_t bytes = 0;  ///< of the whole file
};

struct ShardLayout {
  std::vector<ShardFile> files;
  std::string index;  ///< content of model.safetensors.index.json; empty with one file
  struct Place {
    int file = 0;
    uint64_t offset = 0;  ///< from the start of the file
    uint64_t bytes = 0;
  };
  std::map<std::string, Place> places;
};

/// Tensors fill files in order, each with its own dtype; a file is closed when the next tensor would exceed
/// `max_shard_bytes`. `stem`: "model" or "adapter_model" (which is always one file). Offsets are multiples of the
/// tensor's element size. ValueError when a name comes twice.
ShardLayout shard_layout(const std::vector<StoredTensor>& tensors, int64_t max_shard_bytes, const std::string& stem);

}  // namespace mcore_bridge
