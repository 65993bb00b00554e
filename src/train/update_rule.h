// One optimizer's arithmetic on flat pieces of parameters.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "mcore_bridge/optimizer_options.h"
#include "parallel/parallel_state.h"
#include "train/bucket.h"

namespace mcore_bridge {

/// Consecutive elements of a bucket's shard that are updated alike.
struct Segment {
  struct Piece {
    const ManagedParameter* parameter;
    int64_t begin = 0, end = 0;  ///< of the flattened parameter
    int64_t offset = 0;          ///< in the segment
  };
  std::vector<Piece> pieces;
  double lr_mult = 1;
  bool decays = true;
  bool on_host = false;  ///< master and states are in host memory, `host_grad` and the update too
  at::Tensor parameter;  ///< 1-D, the model's own elements
  at::Tensor grad;
  at::Tensor master;     ///< what is updated; the parameter itself where there is no copy
  at::Tensor remainder;  ///< int16, in place of a master: what the parameter lacks (kernels/param_remainder.h)
  at::Tensor host_grad;
  std::vector<std::pair<std::string, at::Tensor>> states;  ///< by kind

  const at::Tensor& gradient() const { return on_host ? host_grad : grad; }
  bool has_copy() const { return remainder.defined() || !master.is_same(parameter); }
  /// Whether the parameter is FP8 codes, which are made by train/shard_quantizer.h.
  bool is_codes() const { return parameter.scalar_type() == at::kFloat8_e4m3fn; }
};

/// Scalars of one update. Tensors are fp32 scalars on the segments' device, so that the host need not know them.
struct Update {
  double lr = 0, weight_decay = 0;
  at::Tensor grad_scale;  ///< gradients are divided by it
  at::Tensor skip;        ///< 1: everything stays as it is
  at::Tensor steps;       ///< updates done, this one included
};

class UpdateRule {
 public:
  virtual ~UpdateRule() = default;
  /// State kinds and their dtypes, zero before the first step.
  virtual std::vector<std::pair<std::string, at::ScalarType>> kinds() const = 0;
  /// Needs the pieces to be whole parameters.
  virtual bool whole() const { return false; }
  /// Updates masters and states of segments that live on one device.
  virtual void apply(const std::vector<Segment*>& segments, const Update& update) const = 0;
  /// Whether apply() also writes the segment's parameter, in the pass that updates its master.
  virtual bool writes_parameter(const Segment& segment) const { return segment.remainder.defined(); }
};

std::unique_ptr<UpdateRule> make_adamw(const OptimizerOptions& options);
std::unique_ptr<UpdateRule> make_sgd(const OptimizerOptions& options);
std::unique_ptr<UpdateRule> make_muon(const OptimizerOptions& options, ParallelStatePtr parallel);

/// "fp32" | "bf16" | "fp16" (validated).
at::ScalarType precision(const std::string& name);

}  // namespace mcore_bridge
