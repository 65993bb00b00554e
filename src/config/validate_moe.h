// The rules that a mixture of experts keeps.
#pragma once

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

/// Part of ModelConfig::finalize: the model itself.
void check_moe(const ModelConfig& config);
/// Part of check_layout_rules. For a dense model: that nothing asks for experts.
void check_moe_layout(const ModelConfig& config);

}  // namespace mcore_bridge
