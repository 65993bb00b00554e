// How a checkpoint's weights are quantised, by its config.json and the names of its tensors.
#pragma once

#include <string>
#include <vector>

#include "bridge/checkpoint_reader.h"
#include "config/quantization.h"

namespace mcore_bridge {

/// A checkpoint's quantisation by its config.json; also refuses tensors that only other methods have (packed integers,
/// zero points), when config.json does not tell. A folder without config.json is taken by its tensors alone.
Quantization quantization_of(const std::string& path, const CheckpointReader& reader);

/// "fp8", "mxfp4" or "" (none). ValueError for others.
QuantMethod quant_method(const std::string& name);
const char* quant_name(QuantMethod method);

/// Whether quantising a model gives this weight scales: matrices of linear layers, but not embeddings, the output
/// layer, routers and their gates, small projections of linear attention, multi-token-prediction joints and vision
/// towers, as the published checkpoints do it. fp8: [out, in] matrices named "*.weight". mxfp4: stacked and transposed
/// experts
/// "*.experts.gate_up_proj" and "*.experts.down_proj", their inputs a multiple of 32.
bool is_quantized_weight(QuantMethod method, const std::string& name, const std::vector<int64_t>& shape);

/// `quantization_config` of a checkpoint this version writes; `left`: modules that stay as they are.
Json quantization_config(QuantMethod method, BlockSize block, const std::vector<std::string>& left);

/// Names of the tensors beside a quantised weight.
inline std::string fp8_scale_name(const std::string& name) { return name + "_scale_inv"; }
inline std::string mxfp4_blocks_name(const std::string& name) { return name + "_blocks"; }
inline std::string mxfp4_scales_name(const std::string& name) { return name + "_scales"; }

}  // namespace mcore_bridge
