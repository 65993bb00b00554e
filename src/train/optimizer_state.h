// What a training checkpoint knows of an optimizer.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

/// One piece of optimizer state this rank owns: elements [begin, end) of the flattened local parameter (row-major).
struct StateSlice {
  std::string parameter;  ///< local name as named_parameters() gives it
  int chunk = 0;          ///< index of the model chunk it belongs to
  std::string kind;       ///< "master", "remainder", "exp_avg", "exp_avg_sq", "momentum_buffer"
  int64_t begin = 0, end = 0;
  bool of_codes = false;  ///< the parameter is FP8 codes (fp8_param): its values are its "master"
  at::Tensor values;      ///< 1-D [end - begin] in its stored dtype: a view of the live state, loading copies into it
};

class Optimizer {
 public:
  virtual ~Optimizer() = default;

  /// Pieces of all parameters, this rank's share. Without a distributed optimizer every data-parallel rank has all of
  /// them. There is no "master" where the parameter itself is the master (fp32) or has a "remainder"
  /// (param_remainder.h).
  virtual std::vector<StateSlice> state() = 0;
  /// Whether a parameter that is FP8 codes has a "master" here or on another rank that holds it.
  virtual bool trains(const at::Tensor& codes) const = 0;
  virtual int64_t steps() const = 0;  ///< updates done (skipped ones not counted)
  virtual void set_steps(int64_t steps) = 0;
  /// After values were copied into state(): refreshes the parameters from their masters. Collective.
  virtual void state_loaded() = 0;
  /// The rest: numbers that are the same on all ranks.
  virtual Json scalars() const = 0;
  virtual void set_scalars(const Json& values) = 0;
};

}  // namespace mcore_bridge
