// Makes the FP8 codes of weights that train (fp8_param) from their masters: every rank those of its shards, with scales
// that all ranks agree on, so that what is gathered afterwards is a byte a parameter.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <vector>

#include "kernels/fp8_parts.h"
#include "layers/amax_history.h"
#include "layers/linear.h"
#include "parallel/parallel_state.h"
#include "train/update_rule.h"

namespace mcore_bridge {

/// ValueError naming the way out when weights that are kept as FP8 codes are to be trained or spread out in a way that
/// they cannot be.
void check_fp8_param(const std::vector<ManagedParameter>& parameters, const OptimizerOptions& options);

class ShardQuantizer : public WeightMasters {
 public:
  /// Of the weights that train as codes among `parameters`, at least one; pieces and masters of this rank are in
  /// `segments`. `shared`: each of the ranks that hold the same weights has other pieces.
  ShardQuantizer(const std::vector<ManagedParameter>& parameters, const std::vector<std::unique_ptr<Segment>>& segments,
                 const ParallelState& parallel, bool shared);

  /// Codes of the pieces and scales of all weights, from the masters: bit for bit what quantising the whole weight in
  /// its layer's dtype gives. Weights are scaled for their own magnitude, with fp8_recipe delayed too, whose history
  /// takes it. Collective over the tensor-parallel ranks and those that hold the same weights.
  void run();

  at::Tensor values(const at::Tensor& codes) const override;
  bool trains(const at::Tensor& codes) const { return weights_.contains(codes.unsafeGetTensorImpl()); }
  int64_t bytes() const { return static_cast<int64_t>(amax_.nbytes()); }  ///< on the device

 private:
  struct Weight {
    ParallelLinear* layer;
    std::vector<Fp8Part> parts = {};  ///< on this rank
  };
  /// Where the magnitudes of a model chunk's weights go with delayed scaling.
  struct History {
    std::shared_ptr<AmaxHistory> history;
    at::Tensor slots, magnitudes;  ///< by weight
  };
  /// f(parts) for all that are on the device, then for each of those that come from the host.
  template <class F>
  void for_parts(F f) const;

  std::map<const at::TensorImpl*, Weight> weights_;  ///< by their codes
  std::vector<Fp8Part> on_device_, on_host_;         ///< by where their masters are
  std::vector<Fp8ScalePlace> scales_;                ///< of all weights
  std::vector<History> histories_;
  std::vector<Group> agree_;  ///< ranks that have to agree on the magnitudes
  Group replicas_;            ///< ranks that have the pieces of a weight among them
  at::ScalarType dtype_;      ///< of the layers
  at::Tensor amax_;
};

}  // namespace mcore_bridge
