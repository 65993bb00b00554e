#include "layers/attention/self_attention.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "layers/offload.h"
#include "layers/recompute.h"
#include "layers/split_qkv.h"
#include "parallel/random.h"

namespace mcore_bridge {

SelfAttention::SelfAttention(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options,
                             int64_t layer) {
  const auto tp = parallel->tp.size();
  parallel_ = parallel;
  transport_ = parse_transport(config.cp_comm_type);
  recompute_core_ = config.recomputes("core_attn");
  const HeadLayout heads{config.num_attention_heads, config.query_groups(), config.head_dim()};
  local_ = {heads.heads / tp, std::max<int64_t>(1, heads.groups / tp), heads.head_dim};
  rope_ = config.has_rope(layer);
  interleaved_ = config.rotary_interleaved;
  window_ = config.has_window(layer);
  core_ = {.window_left = window_ ? config.window_size.at(0) : -1, .dropout = config.attention_dropout};
  const auto width = heads.heads * heads.head_dim;
  qkv_ = std::make_unique<ParallelLinear>(LinearOptions{.in = config.hidden_size,
                                                        .out = width + 2 * heads.groups * heads.head_dim,
                                                        .shard = Shard::kColumn,
                                                        .fuse = Fuse::kQkv,
                                                        .heads = heads,
                                                        .bias = config.add_qkv_bias,
                                                        .norm = true,
                                                        .norm_epsilon = config.layernorm_epsilon,
                                                        .norm_zero_centered = config.layernorm_zero_centered_gamma,
                                                        .sequence_parallel = config.sequence_parallel,
                                                        .overlap = config.tp_comm_overlap},
                                          parallel, tensor_options);
  proj_ = std::make_unique<ParallelLinear>(LinearOptions{.in = width,
                                                         .out = config.hidden_size,
                                                         .shard = Shard::kRow,
                                                         .bias = config.add_attention_proj_bias,
                                                         .sequence_parallel = config.sequence_parallel,
                                                         .overlap = config.tp_comm_overlap},
                                           parallel, tensor_options);
  if (config.qk_layernorm) {
    const NormOptions norm{.size = heads.head_dim,
                           .epsilon = config.layernorm_epsilon,
                           .zero_centered = config.layernorm_zero_centered_gamma,
                           .sum_over_tp = tp > 1};  // each rank sees its own heads only
    q_norm_ = std::make_unique<Norm>(norm, tensor_options);
    k_norm_ = std::make_unique<Norm>(norm, tensor_options);
  }
}

std::vector<Module::Child> SelfAttention::children() const {
  std::vector<Child> result{{"linear_qkv", qkv_.get()}};
  if (q_norm_) {
    result.push_back({"q_layernorm", q_norm_.get()});
    result.push_back({"k_layernorm", k_norm_.get()});
  }
  result.push_back({"linear_proj", proj_.get()});
  return result;
}

at::Tensor SelfAttention::core(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const AttentionInput& input) const {
  if (input.context) return context_attention(q, k, v, input, window_, core_, training());
  return core_attention(q, k, v, window_ ? input.allowed_in_window : input.allowed, input.packed, core_, training());
}

at::Tensor SelfAttention::attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const AttentionInput& input) const {
  if (core_.dropout == 0 || !training()) return core(q, k, v, input);
  const RandomScope scope(RandomStream::kSplit, *parallel_, q.device());  // heads of this rank's own
  // Without dropout, and on a GPU, kernels keep no scores: there is nothing to recompute for.
  if (!recompute_core_ || !q.is_cpu() || !at::GradMode::is_enabled() || !q.requires_grad()) return core(q, k, v, input);
  auto again = [this, input](const std::vector<at::Tensor>& qkv) {
    return std::vector<at::Tensor>{core(qkv[0], qkv[1], qkv[2], input)};
  };
  return recompute(again, std::vector<at::Tensor>{q, k, v})[0];
}

LinearOutput SelfAttention::forward(const at::Tensor& x_sbh, const AttentionInput& input) {
  const auto [mixed, x] = qkv_->forward(x_sbh, {});  // [s, b, groups * (heads per group + 2) * d]
  SplitQkvOptions split{.groups = local_.groups, .per_group = local_.heads / local_.groups, .d = local_.head_dim};
  if (rope_) {
    split.cos = input.rope.cos;
    split.sin = input.rope.sin;
    split.interleaved = interleaved_;
  }
  if (q_norm_) {
    split.q_weight = q_norm_->weight();
    split.k_weight = k_norm_->weight();
    split.norm = q_norm_->options();
  }
  const auto [q, k, v] = split_qkv(mixed, split);
  for (const auto& kept : {mixed, q, k, v}) ActivationOffload::keep(kept);
  return {proj_->forward(attend(q, k, v, input)), x};
}

Footprint SelfAttention::footprint(const ActivationShape& shape) const {
  auto result = qkv_->footprint(shape);
  const auto fused = shape.tokens() * (local_.heads + 2 * local_.groups) * local_.head_dim * shape.element;
  auto inner = shape;
  inner.input_kept = false;
  inner.input_grad = result.output_grad;
  // The norms' backward reads the fused projection, and v stays a view of it; else all three are copied out of it.
  const bool norm = q_norm_ != nullptr;
  // On the CPU heads that neither turn nor are normalised are views as well, where their strides allow it.
  const bool views = !shape.fused && !rope_ && !norm;
  const CoreAttentionInputs kept{
      .q_kept = views && (local_.groups == 1 || local_.groups == local_.heads), .k_kept = views, .v_kept = norm};
  if (inner.input_grad && (norm || views)) result.saved += fused;
  auto core = shape.context > 1 ? context_attention_footprint(local_, kept, core_, transport_, inner)
                                : core_attention_footprint(local_, kept, core_, inner);
  core.workspace = std::max(core.workspace, 2 * fused);
  result += core;
  inner.input_kept = true;
  result += proj_->footprint(inner);
  return result;
}

}  // namespace mcore_bridge
