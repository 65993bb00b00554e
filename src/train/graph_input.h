// What a recorded micro-batch reads: tensors that stay where they are and are filled before each launch.
#pragma once

#include <ATen/core/Tensor.h>

#include "mcore_bridge/model.h"

namespace mcore_bridge {

/// Calls f(tensor) for the tensors forward and backward of a first and only stage read, in an order that is always the
/// same; undefined ones stand for what is not given.
template <class Input, class F>
void for_tensors(Input& batch, F f) {
  f(batch.input_ids);
  f(batch.position_ids);
  f(batch.attention_mask);
  f(batch.labels);
  f(batch.loss_weight);
  if (batch.packed) f(batch.packed->cu_seqlens);
}

class GraphInput {
 public:
  /// Views of one buffer on `device`, of the sizes and dtypes of `like`'s tensors; the rest is copied from it.
  GraphInput(const ForwardInput& like, c10::Device device);

  /// Copies the tensors of `from`, of the same sizes, in the order of the current stream. Those on the host go through
  /// pinned memory in one copy, and the host does not wait: that memory comes from torch's cache, which lends it again
  /// once the copy is done.
  void fill(const ForwardInput& from);

  const ForwardInput& batch() const { return batch_; }

 private:
  at::Tensor buffer_;  ///< uint8
  ForwardInput batch_;
};

}  // namespace mcore_bridge
