#include "layers/mlp.h"

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

MLP::MLP(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options)
    : activation_(parse_activation(config.hidden_act)) {
  fc1_ = std::make_unique<ParallelLinear>(LinearOptions{.in = config.hidden_size,
                                                        .out = 2 * config.ffn_hidden_size,
                                                        .shard = Shard::kColumn,
                                                        .fuse = Fuse::kGateUp,
                                                        .bias = config.add_mlp_bias,
                                                        .norm = true,
                                                        .norm_epsilon = config.layernorm_epsilon,
                                                        .norm_zero_centered = config.layernorm_zero_centered_gamma,
                                                        .sequence_parallel = config.sequence_parallel,
                                                        .overlap = config.tp_comm_overlap},
                                          parallel, tensor_options);
  fc2_ = std::make_unique<ParallelLinear>(LinearOptions{.in = config.ffn_hidden_size,
                                                        .out = config.hidden_size,
                                                        .shard = Shard::kRow,
                                                        .bias = config.add_mlp_bias,
                                                        .sequence_parallel = config.sequence_parallel,
                                                        .overlap = config.tp_comm_overlap},
                                          parallel, tensor_options);
}

}  // namespace mcore_bridge
