// Fields of Megatron's configs that this version knows but does not use.
#pragma once

#include <string>
#include <vector>

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

/// Accepts a value that changes nothing here (a default, or a hint about speed); throws ValueError for one that would
/// be ignored at the user's cost, and KeyError naming the nearest field for a name nobody knows.
void check_unsupported(const std::string& name, const Json& value);

/// Names of all fields of ModelConfig.
std::vector<std::string> field_names();

}  // namespace mcore_bridge
