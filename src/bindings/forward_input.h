// A Python micro-batch as the engine's ForwardInput.
#pragma once

#include "bindings/bindings.h"
#include "mcore_bridge/model.h"

namespace mcore_bridge {

/// Keys: input_ids, position_ids, attention_mask, labels, hidden (tensors or None) and packed_seq_params (an object
/// with cu_seqlens, or cu_seqlens_q as Megatron calls it). An unknown key is a KeyError. Tensors move to `device`.
ForwardInput forward_input(const py::dict& values, c10::Device device);

}  // namespace mcore_bridge
