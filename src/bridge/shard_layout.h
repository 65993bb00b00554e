// Which tensor goes where in which file: decided from names and sizes alone, before any data.
#pragma once

#include <c10/core/ScalarType.h>

#include <map>
#include <string>
#include <vector>

#include "plan/plan.h"

namespace mcore_bridge {

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
  };
  std::map<std::string, Place> places;
};

/// Tensors fill files in order; a file is closed when the next tensor would exceed `max_shard_bytes`. `stem`: "model"
/// or "adapter_model" (which is always one file). All tensors have `dtype`.
ShardLayout shard_layout(const std::vector<HfTensor>& tensors, c10::ScalarType dtype, int64_t max_shard_bytes,
                         const std::string& stem);

}  // namespace mcore_bridge
