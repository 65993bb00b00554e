// What delayed scaling remembers: the largest magnitudes that each quantised tensor had in the steps before.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "parallel/group.h"

namespace mcore_bridge {

/// One slot per tensor, all in a few tensors. Within a step the references stand still, so micro-batches, recomputed
/// layers and accumulation see the same scales; `update` ends the step.
class AmaxHistory {
 public:
  /// `length`: steps that are looked back on; `most_recent`: only the last one counts.
  AmaxHistory(int64_t slots, int64_t length, bool most_recent, c10::Device device);

  /// Whether `reference` says anything: false until the first update.
  bool known() const { return known_; }
  /// [1]: the magnitude to scale for.
  at::Tensor reference(int64_t slot) const { return reference_.narrow(0, slot, 1); }
  /// [1]: this step's, to be raised.
  at::Tensor next(int64_t slot) const { return next_.narrow(0, slot, 1); }

  /// Raises `next` of several slots (int64, each once) at once.
  void raise(const at::Tensor& slots, const at::Tensor& magnitudes);

  /// This step's magnitudes, the largest over the ranks of every group, become the newest of the history. A slot that
  /// saw nothing finite but zeros repeats its last. Collective.
  void update(const std::vector<Group>& groups);

  int64_t slots() const { return values_.size(0); }
  const at::Tensor& values() const { return values_; }  ///< [slots, length], the newest first
  /// For a run that goes on: rows as `values` gave them, of any length. All zeros: none is known.
  void restore(const at::Tensor& values);

 private:
  void refer();

  bool most_recent_, known_ = false;
  at::Tensor values_, reference_, next_;
};

}  // namespace mcore_bridge
