// The shapes packed micro-batches are recorded in: few, so that rows of other documents find the same CUDA graph.
#pragma once

#include <cstdint>
#include <vector>

#include "mcore_bridge/model.h"

namespace mcore_bridge {

/// All that the host may know of a packed row in recorded work. Decided in graph_shape alone.
struct GraphShape {
  int64_t tokens = 0;     ///< multiple of an eighth of the power of two below them, and of 8: at most 1/8 or 7 more
  int64_t documents = 0;  ///< power of two, at least 8: an empty one costs kernels next to nothing
  int64_t longest = 0;    ///< power of two, at least 512, but not above the one that holds all tokens (128 at least)
  auto operator<=>(const GraphShape&) const = default;
};
GraphShape graph_shape(int64_t tokens, int64_t documents, int64_t longest);

/// A packed micro-batch in its graph_shape, with the same loss and gradients. The row's beginning stands behind it once
/// more without loss, as documents of their own: no value, and so no largest magnitude that FP8 scales for, is new.
/// Documents behind those are empty. cu_seqlens is on the host, cu_seqlens_host empty: nothing may depend on it.
ForwardInput in_graph_shape(const ForwardInput& batch);

/// What two micro-batches have in common that can share recorded work: sizes of tensors, and where documents end if
/// cu_seqlens_host says so.
std::vector<int64_t> shape_key(const ForwardInput& batch);

}  // namespace mcore_bridge
