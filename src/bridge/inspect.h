// The contents of a checkpoint by its headers alone.
#pragma once

#include <string>

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

/// {format: "model" | "adapter", files: [{name, bytes}], tensors: [{name, dtype, shape, bytes, file}], total_bytes}
Json inspect_checkpoint(const std::string& path);

}  // namespace mcore_bridge
