// FP8 of a whole model: which layers, and what delayed scaling remembers of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "mcore_bridge/bridge.h"

namespace mcore_bridge {

class GPTModel;
class Module;

/// What the config's fp8 fields say, for the linear layers of a new model's decoder.
void set_up_fp8(GPTModel& model);

/// fp8_param: what the config says of a decoder layer just made (`number` in the whole model), so that the wide weights
/// of the next need no memory beside it.
void store_weights_in_fp8(const ModelConfig& config, int64_t number, Module& layer);

/// See trainer.h.
void update_fp8_scales(const Chunks& chunks);

/// Per layer, named by its number in the whole model: [3, fp8_amax_history_len] (input, weight, gradient; the newest
/// first). Empty without delayed scaling.
std::map<std::string, at::Tensor> fp8_history(const Chunks& chunks);
/// For a run that goes on; layers that `history` does not name, or an empty one, begin anew.
void set_fp8_history(const Chunks& chunks, const std::map<std::string, at::Tensor>& history);

/// Values that weights stored in FP8 were made from are needed no more.
void forget_wide_weights(const Chunks& chunks);

/// The layers' FP8 weights are made for every use instead of kept over a step.
void drop_fp8_weights(const Chunks& chunks);

}  // namespace mcore_bridge
