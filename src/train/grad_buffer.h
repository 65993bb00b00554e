// Gradients of all trainable parameters in flat fp32 buckets, and their completion over the ranks.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "train/complete_gradients.h"

namespace mcore_bridge {

class GradBuffer {
 public:
  /// Takes the parameters that require gradients. Buckets run in reverse order (the order backward finishes them).
  GradBuffer(const std::vector<NamedParameter>& parameters, ParallelStatePtr parallel,
             int64_t bucket_elements = 10 << 20);
  ~GradBuffer();
  GradBuffer(const GradBuffer&) = delete;
  GradBuffer& operator=(const GradBuffer&) = delete;

  const std::vector<TrainableParameter>& parameters() const { return parameters_; }
  const std::vector<at::Tensor>& buckets() const { return buckets_; }

  /// Zeroes the gradients and (re)connects the parameters to them.
  void begin();
  /// Sums what is partial: over tensor ranks, over the stages that share an embedding, over data-parallel ranks.
  void reduce();
  /// Sum of squares over this rank's share, every element of the model counted once over the model-parallel ranks.
  /// double, on the parameters' device.
  at::Tensor sum_of_squares() const;

 private:
  ParallelStatePtr parallel_;
  std::vector<TrainableParameter> parameters_;
  std::vector<at::Tensor> buckets_;
};

}  // namespace mcore_bridge
