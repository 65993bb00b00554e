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
  chunks_ = rope_ && config.attention_chunk_size.has_value();
  scales_queries_ = !rope_ && config.attn_scale.has_value();
  clip_ = config.clip_qkv;
  epsilon_ = config.layernorm_epsilon;
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
  if (config.softmax_type == "learnable") sinks_ = at::empty({local_.heads}, tensor_options).requires_grad_(true);
  if (rope_ && config.qk_l2_norm) l2_norm_ = at::ones({heads.head_dim}, tensor_options);
  if (!config.qk_layernorm) return;
  const bool whole = config.qk_layernorm_whole;
  NormOptions norm{.size = whole ? width : heads.head_dim,
                   .epsilon = config.layernorm_epsilon,
                   .zero_centered = config.layernorm_zero_centered_gamma,
                   .sum_over_tp = tp > 1};  // each rank sees its own heads only
  q_norm_ = std::make_unique<Norm>(norm, tensor_options);
  if (whole) norm.size = heads.groups * heads.head_dim;
  k_norm_ = std::make_unique<Norm>(norm, tensor_options);
  if (whole) {
    whole_norm_ = WholeQkNormOptions{
        .local = local_, .heads = heads.heads, .groups = heads.groups, .tp = parallel->tp, .norm = q_norm_->options()};
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

std::vector<NamedParameter> SelfAttention::own_parameters() const {
  if (!sinks_.defined()) return {};
  const bool split = parallel_->tp.size() > 1;
  return {{"core_attention.softmax_offset", sinks_, {.tp_split = split, .no_weight_decay = true}}};
}

at::Tensor SelfAttention::core(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const AttentionInput& input) const {
  const auto& allowed = window_ || chunks_ ? input.allowed_in_window : input.allowed;
  if (sinks_.defined() && allowed.defined()) return masked_attention_with_sinks(q, k, v, allowed, sinks_);
  if (input.context) return context_attention(q, k, v, input, window_, core_, training(), sinks_);
  if (chunks_ && input.chunks) return core_attention(q, k, v, allowed, input.chunks, nullptr, core_, training());
  return core_attention(q, k, v, allowed, input.packed, input.rows, core_, training());
}

at::Tensor SelfAttention::prepared(const at::Tensor& mixed) const {
  auto result = mixed;
  if (whole_norm_) {
    const auto& o = *whole_norm_;
    auto own = [&](const at::Tensor& weight, int64_t heads, int64_t copies) {
      const auto width = heads * local_.head_dim;
      return weight.narrow(0, parallel_->tp.rank() / copies * width, width);
    };
    result = whole_qk_norm(result, own(q_norm_->weight(), local_.heads, 1),
                           own(k_norm_->weight(), local_.groups, o.copies()), o);
  }
  return clip_ ? result.clamp(-*clip_, *clip_) : result;
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
  if (l2_norm_.defined()) {
    // The norm of a head does not change when it turns, so that it may come first.
    split.q_weight = split.k_weight = l2_norm_;
    split.norm = {.epsilon = epsilon_};
  } else if (q_norm_ && !whole_norm_) {
    split.q_weight = q_norm_->weight();
    split.k_weight = k_norm_->weight();
    split.norm = q_norm_->options();
  }
  auto [q, k, v] = split_qkv(prepared(mixed), split);
  if (scales_queries_) q = q * input.query_scale;
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
  const bool norm = (q_norm_ && !whole_norm_) || l2_norm_.defined();
  // On the CPU heads that neither turn nor are normalised are views as well, where their strides allow it.
  const bool views = !shape.fused && !rope_ && !norm;
  const bool exchanged = shape.context > 1 && transport_ == Transport::kAllToAll;  // in a copy of all three
  const bool scores = keeps_scores(core_, shape), again = scores && recompute_core_;
  const bool views_kept = views && !exchanged && (!scores || again);
  const CoreAttentionInputs kept{
      .q_kept = views && (local_.groups == 1 || local_.groups == local_.heads), .k_kept = views, .v_kept = norm};
  if (inner.input_grad && (norm || views_kept)) {
    result.saved += fused;
    result.offloaded += fused;
  }
  if (inner.input_grad && l2_norm_.defined()) result.saved += l2_norm_.numel() * shape.element;
  if (whole_norm_) {
    const auto squares = Traffic::all_reduce(2 * 4 * shape.tokens(), parallel_->tp.size());
    result.tensor_forward += squares;
    if (inner.input_grad) {
      result.saved += fused + 2 * 4 * shape.tokens();  // the row in front of the norm, its two scales
      result.tensor_backward += squares;
    }
  }
  if (inner.input_grad && clip_) result.saved += fused;
  if (inner.input_grad && (whole_norm_ || clip_)) result.offloaded += fused;  // the projection itself
  // Layers with sinks work by tiles, alone as well.
  const auto transport = shape.context > 1 ? transport_ : Transport::kAllGather;
  auto core = shape.context > 1 || sinks_.defined() ? context_attention_footprint(local_, kept, core_, transport, inner)
                                                    : core_attention_footprint(local_, kept, core_, inner);
  if (again && inner.input_grad) {
    const auto head = shape.tokens() * local_.head_dim * shape.element, out = head * local_.heads;
    core.recompute((kept.q_kept ? 0 : out) + head * local_.groups * ((kept.k_kept ? 0 : 1) + (kept.v_kept ? 0 : 1)));
    core.offloaded = core.saved += out;
  }
  core.workspace = std::max(core.workspace, 2 * fused);
  result += core;
  inner.input_kept = true;
  result += proj_->footprint(inner);
  return result;
}

}  // namespace mcore_bridge
