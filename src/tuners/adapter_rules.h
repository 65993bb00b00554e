// Weight rules of an adapter: LoRA matrices under PEFT's file names, and modules saved in full.
#pragma once

#include <string>
#include <vector>

#include "families/family.h"
#include "mcore_bridge/lora.h"

namespace mcore_bridge {

/// `base`: rules of a chunk (or of the whole model). Pure: every rank can compute every stage's.
std::vector<WeightRule> adapter_rules(const std::vector<WeightRule>& base, const LoraOptions& options,
                                      const std::string& adapter_name);

/// Whether adapted experts have last names (gate_proj, ...) that other adapted layers have too: PEFT on Transformers 5,
/// which keeps all experts in one tensor, cannot tell them apart.
bool experts_share_names(const ModelConfig& config, const LoraOptions& options);

/// The content of adapter_config.json as PEFT reads it; target_modules are Hugging Face names.
Json peft_config(const ModelConfig& config, const LoraOptions& options, const std::string& base_model);

}  // namespace mcore_bridge
