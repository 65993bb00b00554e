#include "layers/attention/core_attention.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>

#include <cmath>
#include <limits>

#include "layers/attention/all_gather.h"
#include "layers/attention/all_to_all.h"
#include "layers/attention/ring.h"
#include "layers/offload.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {

at::Tensor causal_mask(int64_t length, int64_t window_left, c10::Device device) {
  const auto position = at::arange(length, at::TensorOptions(device).dtype(at::kLong));
  const auto distance = position.unsqueeze(1) - position.unsqueeze(0);  // query - key
  auto mask = distance.ge(0);
  return window_left < 0 ? mask : mask.logical_and_(distance.le(window_left));
}

namespace {

bool half_precision(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

bool flash_attention_takes(c10::Device device, at::ScalarType type, int64_t width) {
  return device.is_cuda() && half_precision(type) && width <= 256 && width % 8 == 0;
}

/// cuDNN's fused attention, about twice as fast as flash attention on Hopper; it keeps a plan for each shape.
bool cudnn_attention_takes(const at::Tensor& q) {
  if (!q.is_cuda() || !half_precision(q.scalar_type()) || q.size(-1) > 128 || q.size(-1) % 8 != 0) return false;
  return at::globalContext().userEnabledCuDNNSDP() && at::detail::getCUDAHooks().hasCuDNN() &&
         at::detail::getCUDAHooks().versionCuDNN() >= 90300;
}

/// [s, b, n, d] -> [s, b, n * d] through scaled_dot_product_attention.
at::Tensor dense_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& allowed,
                           double dropout) {
  auto heads_first = [](const at::Tensor& x) { return x.permute({1, 2, 0, 3}); };
  if (cudnn_attention_takes(q) && !allowed.defined() && dropout == 0) {
    const auto out = std::get<0>(at::_scaled_dot_product_cudnn_attention(heads_first(q), heads_first(k), heads_first(v),
                                                                         std::nullopt, /*compute_log_sumexp=*/true, 0.0,
                                                                         /*is_causal=*/true));
    return out.permute({2, 0, 1, 3}).flatten(-2);
  }
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

bool attention_reads_host_ends(const ModelConfig& config, c10::Device device) {
  return config.context_parallel_size > 1 || config.softmax_type == "learnable" || config.attention_chunk_size ||
         !flash_attention_takes(device, config.params_dtype, config.head_dim());
}

at::Tensor core_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& allowed,
                          const std::optional<PackedSeqParams>& packed, const std::shared_ptr<RaggedRows>& rows,
                          const CoreAttentionOptions& options, bool training) {
  const double dropout = training ? options.dropout : 0;
  const bool flash = flash_attention_takes(q.device(), q.scalar_type(), q.size(-1));
  if (packed) {
    if (rows && dropout == 0) {
      if (auto out = cudnn_attention(q, k, v, rows, options.window_left); out.defined()) return out;
    }
    if (flash && q.size(1) == 1) return flash_attention(q, k, v, packed, options.window_left, dropout);
    std::vector<at::Tensor> documents;
    const auto& ends = packed->cu_seqlens_host;
    MCB_CHECK(!ends.empty(), "attention: no kernel of this GPU and model reads on the device where documents end");
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
    if (dropout == 0 && cudnn_attention_here(q.device())) {
      if (auto out = cudnn_attention(q, k, v, {}, options.window_left); out.defined()) return out;
    }
    if (flash) return flash_attention(q, k, v, packed, options.window_left, dropout);
    return dense_attention(q, k, v, causal_mask(q.size(0), options.window_left, q.device()), dropout);
  }
  return dense_attention(q, k, v, allowed, dropout);
}

namespace {

/// Attention of this rank's heads over whole sequences.
at::Tensor attention_by_heads(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const AttentionInput& input, const CoreAttentionOptions& options, bool training) {
  const auto& plan = input.context;
  const auto cp = plan->group.size();
  // One exchange for all three: each rank's heads of q, k and v side by side.
  auto blocks = [&](const at::Tensor& x) { return x.unflatten(2, {cp, x.size(2) / cp}); };
  const auto heads = sequence_to_heads(at::cat({blocks(q), blocks(k), blocks(v)}, 3).flatten(2, 3), plan);
  const auto queries = q.size(2) / cp, keys = k.size(2) / cp;
  const auto out =
      core_attention(heads.narrow(2, 0, queries), heads.narrow(2, queries, keys), heads.narrow(2, queries + keys, keys),
                     {}, input.packed, input.rows, options, training);
  for (const auto& kept : {heads, out}) ActivationOffload::keep(kept);
  return heads_to_sequence(out.unflatten(-1, {queries, q.size(3)}), plan);
}

}  // namespace

at::Tensor masked_attention_with_sinks(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       const at::Tensor& allowed, const at::Tensor& sinks) {
  const auto s = q.size(0), b = q.size(1), n = q.size(2), d = q.size(3), g = k.size(2);
  const auto type = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto queries = q.permute({1, 2, 0, 3}).reshape({b, g, n / g * s, d});
  const auto keys = k.permute({1, 2, 3, 0}), values = v.permute({1, 2, 0, 3});
  auto scores = at::matmul(queries, keys).to(type).view({b, n, s, s}) / std::sqrt(static_cast<double>(d));
  scores = scores.masked_fill(allowed.logical_not(), -std::numeric_limits<double>::infinity());
  const auto sink = sinks.to(type).view({1, n, 1, 1}).expand({b, n, s, 1});
  const auto weights = at::cat({scores, sink}, -1).softmax(-1).narrow(-1, 0, s).to(v.scalar_type());
  const auto out = at::matmul(weights.reshape({b, g, n / g * s, s}), values).view({b, n, s, d});
  return out.permute({2, 0, 1, 3}).flatten(-2);
}

at::Tensor context_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionInput& input,
                             bool window, const CoreAttentionOptions& options, bool training, const at::Tensor& sinks) {
  switch (input.context->transport) {
    case Transport::kRing:
      return ring_attention(q, k, v, input.context, window, sinks).flatten(-2);
    case Transport::kAllGather:
      return all_gather_attention(q, k, v, input.context, window, sinks).flatten(-2);
    case Transport::kAllToAll:
      TORCH_INTERNAL_ASSERT(!sinks.defined());
      return attention_by_heads(q, k, v, input, options, training).flatten(-2);
  }
  return {};
}

namespace {

/// Bytes of all heads' scores in fp32: every query against every key of its document.
int64_t score_bytes(const HeadLayout& heads, const ActivationShape& shape) {
  return shape.tokens() * heads.heads * (shape.sequence * shape.context / shape.documents) * 4;
}

/// Bytes of the masks by which the CPU knows a window that hides something.
int64_t window_masks(const CoreAttentionOptions& options, const ActivationShape& shape) {
  const auto length = shape.sequence * shape.context / shape.documents;
  const bool masked = !shape.fused && options.window_left >= 0 && options.window_left < length - 1;
  return masked && !keeps_scores(options, shape) ? shape.documents * length * length * shape.element : 0;
}

}  // namespace

Footprint core_attention_footprint(const HeadLayout& heads, const CoreAttentionInputs& inputs,
                                   const CoreAttentionOptions& options, const ActivationShape& shape, bool tiles) {
  const auto tokens = shape.tokens(), q = tokens * heads.heads * heads.head_dim * shape.element,
             kv = tokens * heads.groups * heads.head_dim * shape.element;
  // Two products of [queries, keys attended], twice as many in backward (not counting the scores it makes again).
  const auto keys = shape.attended(options.window_left < 0 ? -1 : options.window_left + 1);
  const auto flops = 2.0 * static_cast<double>(tokens) * keys * static_cast<double>(heads.heads * heads.head_dim);
  Footprint result{.forward_flops = 2 * flops, .output_grad = shape.input_grad};
  if (!shape.input_grad) return result;
  result.backward_flops = 4 * flops;
  if (keeps_scores(options, shape)) {
    // Scaled queries and keys, a head of keys and values for every query's; probabilities, mask, what it leaves.
    const auto wide = q / shape.element * 4, scores = score_bytes(heads, shape);
    const bool values = reads_values(heads, shape);
    result.offloaded = q + (values && !inputs.v_kept ? kv : 0);
    result.saved = result.offloaded + (values ? 2 : 3) * wide + 3 * scores;
    result.workspace = 4 * wide + scores;  // each of the three goes when its gradient is there
    return result;
  }
  result.offloaded = q;  // output
  if (!inputs.q_kept) result.offloaded += q;
  if (!inputs.k_kept) result.offloaded += kv;
  if (!inputs.v_kept) result.offloaded += kv;
  result.saved = result.offloaded + tokens * heads.heads * 4;  // fp32 log-sum-exp
  if (!tiles) {
    result.saved += window_masks(options, shape);
    if (!shape.fused && shape.documents > 1) result.saved += q;  // documents one by one, then joined
  }
  result.workspace = 2 * q + 2 * kv;  // gradients of output, q, k and v
  return result;
}

Footprint context_attention_footprint(const HeadLayout& heads, const CoreAttentionInputs& inputs,
                                      const CoreAttentionOptions& options, Transport transport,
                                      const ActivationShape& shape) {
  const auto cp = shape.context, e = shape.element;
  const auto tokens = shape.tokens(), q = tokens * heads.heads * heads.head_dim,
             kv = tokens * heads.groups * heads.head_dim;
  constexpr int64_t kSum = 4;  // bytes of what is added up
  auto result = core_attention_footprint(heads, inputs, options, shape, transport != Transport::kAllToAll);
  switch (transport) {
    case Transport::kRing:
      result.context_forward = Traffic::exchange(2 * kv * e) * (cp - 1);
      result.context_backward = result.context_forward;
      result.context_backward += Traffic::exchange(2 * kv * kSum) * cp;
      // Keys and values here, leaving and coming; their gradients likewise; the queries'.
      result.workspace = 3 * 2 * kv * e + 4 * 2 * kv * kSum + q * kSum + q * e;
      break;
    case Transport::kAllGather:
      result.context_forward = Traffic::all_gather(2 * cp * kv * e, cp);
      result.context_backward = result.context_forward;
      result.context_backward += Traffic::reduce_scatter(2 * cp * kv * kSum, cp);
      result.workspace = 2 * 2 * cp * kv * e + 2 * 2 * cp * kv * kSum + q * kSum + q * e;
      break;
    case Transport::kAllToAll:
      result.context_forward = Traffic::all_to_all((q + 2 * kv) * e, cp);
      result.context_forward += Traffic::all_to_all(q * e, cp);
      result.context_backward = result.context_forward;
      if (shape.input_grad) {
        // Views of one exchanged tensor, the output, and the same back in this rank's part of the sequence.
        const auto exchanged = (q + 2 * kv) * e, workspace = 3 * exchanged;
        if (keeps_scores(options, shape)) {
          const auto values = reads_values(heads, shape) ? exchanged - (inputs.v_kept ? 0 : kv * e) : 0;
          result.saved += values;
          result.offloaded += values;
          result.workspace += workspace;
        } else {
          // Documents one by one are kept in the place of the output that joins them.
          const auto outputs = shape.fused || shape.documents == 1 ? 2 * q * e : q * e;
          result.offloaded = exchanged + outputs;
          result.saved = exchanged + 2 * q * e + tokens * heads.heads * 4 + window_masks(options, shape);
          result.workspace = workspace;
        }
      }
      break;
  }
  if (!shape.input_grad) result.context_backward = {};
  return result;
}

}  // namespace mcore_bridge
