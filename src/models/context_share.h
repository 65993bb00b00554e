// A micro-batch cut for context parallelism.
#pragma once

#include <string>
#include <vector>

#include "mcore_bridge/model.h"
#include "parallel/parallel_state.h"

namespace mcore_bridge {

/// The documents of a whole micro-batch, as cu_seqlens.
std::vector<int64_t> document_ends(const ForwardInput& whole);

/// Throws ValueError, starting with `what`, when the whole micro-batch cannot be cut for this layout.
void check_context_share(const ForwardInput& whole, const ModelConfig& config, const ParallelState& parallel,
                         const std::string& what);

/// This context-parallel rank's part of a whole micro-batch (the same on all of them): input_ids, labels, position_ids
/// cut, attention_mask (padding on the right, harmless) dropped, cu_seqlens kept. Without context parallelism the
/// batch itself.
ForwardInput context_share(const ForwardInput& whole, const ParallelState& parallel);

/// Of a [b, s] mask, 1 = token, 0 = padding: no token stands behind padding. Waits for the mask's device.
bool padded_on_the_right(const at::Tensor& attention_mask);
/// A [b, s] mask may only mark padding behind the tokens: throws ValueError otherwise. Waits for the mask's device.
void check_right_padding(const at::Tensor& attention_mask, const std::string& what);

}  // namespace mcore_bridge
