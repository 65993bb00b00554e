#include "layers/attention.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "mcore_bridge/error.h"

namespace mcore_bridge {

at::Tensor causal_mask(int64_t length, int64_t window_left, c10::Device device) {
  const auto position = at::arange(length, at::TensorOptions(device).dtype(at::kLong));
  const auto distance = position.unsqueeze(1) - position.unsqueeze(0);  // query - key
  auto mask = distance.ge(0);
  return window_left < 0 ? mask : mask.logical_and_(distance.le(window_left));
}

namespace {

/// [s, b, n, d] -> [s, b, n * d] through scaled_dot_product_attention.
at::Tensor dense_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& allowed,
                           double dropout) {
  auto heads_first = [](const at::Tensor& x) { return x.permute({1, 2, 0, 3}); };
  const auto mask = allowed.defined() ? std::optional<at::Tensor>(allowed) : std::nullopt;
  const auto out = at::scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v), mask, dropout,
                                                    /*is_causal=*/!allowed.defined(), std::nullopt,
                                                    /*enable_gqa=*/q.size(2) != k.size(2));
  return out.permute({2, 0, 1, 3}).flatten(-2);
}

/// Flash attention reads documents through cu_seqlens and windows without a mask.
at::Tensor flash_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const std::optional<PackedSeqParams>& packed, int64_t window_left, double dropout) {
  const auto right = window_left >= 0 ? std::optional<int64_t>(0) : std::nullopt;
  const auto left = window_left >= 0 ? std::optional<int64_t>(window_left) : std::nullopt;
  if (packed) {
    const auto out = std::get<0>(at::_flash_attention_forward(
        q.squeeze(1), k.squeeze(1), v.squeeze(1), packed->cu_seqlens, packed->cu_seqlens, packed->max_seqlen,
        packed->max_seqlen, dropout, /*is_causal=*/true, false, std::nullopt, left, right));
    return out.flatten(-2).unsqueeze(1);
  }
  auto batch_first = [](const at::Tensor& x) { return x.transpose(0, 1); };
  const auto out = std::get<0>(at::_flash_attention_forward(batch_first(q), batch_first(k), batch_first(v),
                                                            std::nullopt, std::nullopt, q.size(0), k.size(0), dropout,
                                                            /*is_causal=*/true, false, std::nullopt, left, right));
  return out.transpose(0, 1).flatten(-2);
}

}  // namespace

at::Tensor core_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& allowed,
                          const std::optional<PackedSeqParams>& packed, const CoreAttentionOptions& options,
                          bool training) {
  const double dropout = training ? options.dropout : 0;
  const bool half = q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16;
  const bool flash = q.is_cuda() && half && q.size(-1) <= 256 && q.size(-1) % 8 == 0;
  if (packed) {
    if (flash) return flash_attention(q, k, v, packed, options.window_left, dropout);
    std::vector<at::Tensor> documents;
    const auto& ends = packed->cu_seqlens_host;
    for (size_t i = 0; i + 1 < ends.size(); ++i) {
      const auto first = ends[i], length = ends[i + 1] - ends[i];
      if (length == 0) continue;
      // A window at least as long as the document hides nothing.
      const bool windowed = options.window_left >= 0 && options.window_left < length - 1;
      const auto mask = windowed ? causal_mask(length, options.window_left, q.device()) : at::Tensor();
      documents.push_back(dense_attention(q.narrow(0, first, length), k.narrow(0, first, length),
                                          v.narrow(0, first, length), mask, dropout));
    }
    return documents.size() == 1 ? documents[0] : at::cat(documents, 0);
  }
  if (!allowed.defined() && options.window_left >= 0 && options.window_left < q.size(0) - 1) {
    if (flash) return flash_attention(q, k, v, packed, options.window_left, dropout);
    return dense_attention(q, k, v, causal_mask(q.size(0), options.window_left, q.device()), dropout);
  }
  return dense_attention(q, k, v, allowed, dropout);
}

SelfAttention::SelfAttention(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options,
                             int64_t layer) {
  const auto tp = parallel->tp.size();
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
                                                        .sequence_parallel = config.sequence_parallel},
                                          parallel, tensor_options);
  proj_ = std::make_unique<ParallelLinear>(LinearOptions{.in = width,
                                                         .out = config.hidden_size,
                                                         .shard = Shard::kRow,
                                                         .bias = config.add_attention_proj_bias,
                                                         .sequence_parallel = config.sequence_parallel},
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

at::Tensor SelfAttention::forward(const at::Tensor& x_sbh, const AttentionInput& input) {
  const auto mixed = qkv_->forward(x_sbh);  // [s, b, groups * (heads per group + 2) * d]
  const auto s = mixed.size(0), b = mixed.size(1), d = local_.head_dim, per_group = local_.heads / local_.groups;
  const auto grouped = mixed.view({s, b, local_.groups, (per_group + 2) * d});
  auto q = grouped.narrow(-1, 0, per_group * d).reshape({s, b, local_.heads, d});
  auto k = grouped.narrow(-1, per_group * d, d);
  const auto v = grouped.narrow(-1, (per_group + 1) * d, d);
  if (q_norm_) {
    q = q_norm_->forward(q);
    k = k_norm_->forward(k);
  }
  if (rope_) {
    q = apply_rope(q, input.rope, interleaved_);
    k = apply_rope(k, input.rope, interleaved_);
  }
  return proj_->forward(
      core_attention(q, k, v, window_ ? input.allowed_in_window : input.allowed, input.packed, core_, training()));
}

}  // namespace mcore_bridge
