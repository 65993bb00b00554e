// Causal attention of whole sequences over libtorch's fused kernels.
//
// Shapes: s sequence, b batch, t packed tokens (b == 1), n heads, d head width.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "layers/attention/context_plan.h"
#include "layers/attention/cudnn_attention.h"
#include "layers/footprint.h"
#include "layers/rope.h"
#include "mcore_bridge/model.h"
#include "plan/weight_rule.h"

namespace mcore_bridge {

/// What every attention layer of one forward shares: made once a micro-batch.
struct AttentionInput {
  RopeTable rope;
  std::optional<PackedSeqParams> packed;
  std::shared_ptr<RaggedRows> rows;  ///< of `packed`, where cuDNN may take them
  /// bool [b, 1, s, s], true = attend; undefined when causality alone decides. The second one is for layers with a
  /// sliding window or chunks.
  at::Tensor allowed, allowed_in_window;
  /// For layers with chunks (ModelConfig::attention_chunk_size): the documents, or the row, cut into them. Without:
  /// nothing is longer than a chunk, or `allowed_in_window` says it.
  std::optional<PackedSeqParams> chunks;
  at::Tensor query_scale;  ///< [s, b or 1, 1, 1] for layers without RoPE (ModelConfig::attn_scale)
  /// Null without context parallelism, unless the model has attention sinks, whose layers always work by tiles.
  ContextPlanPtr context;
};

/// Window of keys to the left (tokens besides the own one); -1: unbounded.
struct CoreAttentionOptions {
  int64_t window_left = -1;
  double dropout = 0;
};

/// Causal attention. q [s, b, n, d], k and v [s, b, groups, d] -> [s, b, n * d]. `allowed` as in AttentionInput.
at::Tensor core_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& allowed,
                          const std::optional<PackedSeqParams>& packed, const std::shared_ptr<RaggedRows>& rows,
                          const CoreAttentionOptions& options, bool training);

/// Whether attention of packed rows reads PackedSeqParams::cu_seqlens_host. If not, where documents end is read on the
/// device, and the host needs their number, the longest one's length or more, and the tokens of all.
bool attention_reads_host_ends(const ModelConfig& config, c10::Device device);

/// Every head has one more key of score `sinks` [n] and value 0, under any mask `allowed`. Holds all scores.
at::Tensor masked_attention_with_sinks(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       const at::Tensor& allowed, const at::Tensor& sinks);

/// core_attention for this rank's part of the sequence, collective over the context-parallel ranks. `window`: the layer
/// has the sliding window of options.window_left. `sinks` [n] or undefined: see masked_attention_with_sinks.
at::Tensor context_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionInput& input,
                             bool window, const CoreAttentionOptions& options, bool training, const at::Tensor& sinks);
/// Of core_attention with these local heads, its three inputs included unless somebody else keeps (and counts) them.
struct CoreAttentionInputs {
  bool q_kept = false, k_kept = false, v_kept = false;
};
/// With dropout libtorch's CPU has no fused kernel: the scores exist, and are kept in fp32.
inline bool keeps_scores(const CoreAttentionOptions& options, const ActivationShape& shape) {
  return options.dropout > 0 && !shape.fused;
}
/// Whether backward then reads the values themselves, not a copy for every query head in fp32.
inline bool reads_values(const HeadLayout& heads, const ActivationShape& shape) {
  return heads.heads == heads.groups && shape.element == 4;
}
/// `tiles`: computed by tiles (tile.h), which give one result for all documents and need no masks for windows.
Footprint core_attention_footprint(const HeadLayout& heads, const CoreAttentionInputs& inputs,
                                   const CoreAttentionOptions& options, const ActivationShape& shape,
                                   bool tiles = false);
/// Of context_attention, what it passes on to the linear layer behind included.
Footprint context_attention_footprint(const HeadLayout& heads, const CoreAttentionInputs& inputs,
                                      const CoreAttentionOptions& options, Transport transport,
                                      const ActivationShape& shape);

/// The mask of a causal (window_left >= 0: windowed) attention as bool [s, s].
at::Tensor causal_mask(int64_t length, int64_t window_left, c10::Device device);

}  // namespace mcore_bridge
