// Which linear layers, or parts of fused ones, an adapter goes to.
#pragma once

#include <string>
#include <vector>

#include "families/family.h"
#include "mcore_bridge/lora.h"

namespace mcore_bridge {

/// The parts of one linear layer that the options name; all false: not adapted.
struct LinearTarget {
  std::string name;         ///< Megatron name of the module in its chunk
  std::vector<bool> parts;  ///< one per Hugging Face tensor of its weight
};

/// Matches the weight matrices among `rules` (a chunk's, or all chunks' to check that every name hits something).
/// Targets are Megatron or Hugging Face module names, or dotted suffixes of them; a Megatron name stands for all parts.
std::vector<LinearTarget> match_targets(const std::vector<WeightRule>& rules, const LoraOptions& options);

/// Parameters (rule names) of the modules that `modules_to_save` names.
std::vector<std::string> match_modules_to_save(const std::vector<WeightRule>& rules, const LoraOptions& options);

/// Throws ValueError naming the first target that matches nothing in the whole model, and what there is.
void check_targets(const ModelConfig& config, const LoraOptions& options);

}  // namespace mcore_bridge
