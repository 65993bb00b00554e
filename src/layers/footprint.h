// What a module costs for one micro-batch, as arithmetic beside the code that spends it: activations kept for backward,
// temporaries, FLOPs, communication. Nothing runs; the planner adds these up.
#pragma once

#include <cstdint>

#include "parallel/traffic.h"

namespace mcore_bridge {

/// One micro-batch as a module sees it on this rank.
struct ActivationShape {
  int64_t sequence = 0;    ///< positions of a row on this context-parallel rank, before sequence parallelism cuts them
  int64_t batch = 1;       ///< rows
  int64_t element = 4;     ///< bytes of an activation
  int64_t documents = 1;   ///< documents of equal length in a row
  int64_t context = 1;     ///< context-parallel ranks, which share a row
  bool fused = false;      ///< GPU kernels: fused norms, flash attention, boolean dropout masks
  bool input_grad = true;  ///< the module's input requires gradients
  bool training_loss = true;  ///< the head makes its gradients in forward (ForwardInput::loss_weight)
  bool input_kept = false;    ///< somebody else keeps (and counts) the module's input
  int64_t tokens() const { return sequence * batch; }
  /// Keys a query attends to on average when it sees `window` of the tokens up to itself (-1: all of its document).
  double attended(int64_t window = -1) const {
    const auto length = static_cast<double>(sequence * context) / static_cast<double>(documents);
    const auto most = window < 0 || static_cast<double>(window) > length ? length : static_cast<double>(window);
    return length > 0 ? most * ((most + 1) / 2 + length - most) / length : 0;
  }
};

/// What layers with experts send. Routers count loads over the tensor-context and the data-parallel groups.
struct ExpertTraffic {
  Traffic expert, expert_tensor, tensor_context, data;
  ExpertTraffic& operator+=(const ExpertTraffic& next) {
    expert += next.expert;
    expert_tensor += next.expert_tensor;
    tensor_context += next.tensor_context;
    data += next.data;
    return *this;
  }
  ExpertTraffic operator*(int64_t times) const {
    return {expert * times, expert_tensor * times, tensor_context * times, data * times};
  }
};

/// A storage counts once: in the module that saves it first, its own input included unless `input_kept`.
struct Footprint {
  int64_t saved = 0;      ///< bytes kept from forward to backward
  int64_t offloaded = 0;  ///< of them: those that wait in host memory where the layer is offloaded
  int64_t workspace = 0;  ///< most bytes alive at once in backward beyond `saved`
  int64_t deferred = 0;   ///< bytes that wait for the weights' gradients when those come apart (zero-bubble schedules)
  double forward_flops = 0, backward_flops = 0;
  double recomputed_flops = 0;  ///< the part of backward's that runs forward again
  double unread_flops = 0;      ///< the part of forward's that running it again leaves out (LinearPlan::unused)
  Traffic tensor_forward, tensor_backward;    ///< over the tensor-parallel group
  Traffic context_forward, context_backward;  ///< over the context-parallel group
  ExpertTraffic experts_forward, experts_backward;
  bool output_grad = true;  ///< the output requires gradients

  /// One module after the other: everything adds up but the temporaries. Backward is through with `next`, and what that
  /// kept is gone, when it comes to this.
  Footprint& operator+=(const Footprint& next) {
    saved += next.saved;
    offloaded += next.offloaded;
    workspace = workspace - next.saved > next.workspace ? workspace - next.saved : next.workspace;
    deferred += next.deferred;
    forward_flops += next.forward_flops;
    recomputed_flops += next.recomputed_flops;
    unread_flops = next.unread_flops;  // only the last output goes unread
    backward_flops += next.backward_flops;
    tensor_forward += next.tensor_forward;
    tensor_backward += next.tensor_backward;
    context_forward += next.context_forward;
    context_backward += next.context_backward;
    experts_forward += next.experts_forward;
    experts_backward += next.experts_backward;
    output_grad = next.output_grad;
    return *this;
  }

  /// Only `input` bytes are kept, and backward runs forward again.
  void recompute(int64_t input) {
    workspace += saved;
    saved = input;
    offloaded = 0;
    backward_flops += forward_flops - unread_flops;
    recomputed_flops += forward_flops - unread_flops;
    unread_flops = 0;
    tensor_backward += tensor_forward;
    context_backward += context_forward;
    experts_backward += experts_forward;
  }
};

}  // namespace mcore_bridge
