#include "layers/mlp.h"

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

MLP::MLP(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options, Options options)
    : activation_(gated_options(config)), sequence_split_(config.sequence_parallel ? parallel->tp.size() : 1) {
  fc1_ = std::make_unique<ParallelLinear>(LinearOptions{.in = config.hidden_size,
                                                        .out = 2 * options.width,
                                                        .shard = Shard::kColumn,
                                                        .fuse = Fuse::kGateUp,
                                                        .bias = config.add_mlp_bias,
                                                        .norm = options.norm,
                                                        .norm_epsilon = config.layernorm_epsilon,
                                                        .norm_zero_centered = config.layernorm_zero_centered_gamma,
                                                        .sequence_parallel = config.sequence_parallel,
                                                        .overlap = config.tp_comm_overlap},
                                          parallel, tensor_options);
  fc2_ = std::make_unique<ParallelLinear>(LinearOptions{.in = options.width,
                                                        .out = config.hidden_size,
                                                        .shard = Shard::kRow,
                                                        .bias = config.add_mlp_bias,
                                                        .sequence_parallel = config.sequence_parallel,
                                                        .overlap = config.tp_comm_overlap,
                                                        .gated = true},
                                          parallel, tensor_options);
}

Footprint MLP::footprint(const ActivationShape& shape) const {
  auto result = fc1_->footprint(shape);
  result.workspace += shape.tokens() * fc1_->options().in * shape.element / sequence_split_;  // the residual's gradient
  auto inner = shape;
  inner.input_kept = false;
  inner.input_grad = result.output_grad;
  result += fc2_->footprint(inner, /*gated=*/true);
  return result;
}

}  // namespace mcore_bridge
