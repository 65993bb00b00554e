// The rules of ModelConfig::finalize that depend on the parallel sizes.
#pragma once

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

/// Throws ValueError when the model cannot be split by the config's parallel sizes.
void check_layout_rules(const ModelConfig& config);

}  // namespace mcore_bridge
