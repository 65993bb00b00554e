// Who sees to it that parameters are in place when a part of the model runs.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>

namespace mcore_bridge {

/// Training that keeps parameters elsewhere between uses (full sharding, gathers that overlap with other work) stands
/// here. A chunk's units, in forward order: the embedding, each layer, the final norm with the output layer.
class ParameterGate {
 public:
  virtual ~ParameterGate() = default;

  /// f(x), the forward of `unit`, with its parameters in place now and in f's backward. `x` may be undefined.
  virtual at::Tensor run(int unit, const at::Tensor& x, const std::function<at::Tensor(const at::Tensor&)>& f) = 0;

  /// Puts the chunk's parameters (those whose name `wanted` accepts; empty: all) in place until release_all().
  /// Collective over the ranks that share them; may be nested.
  virtual void hold(const std::function<bool(const std::string&)>& wanted) = 0;
  virtual void release_all() = 0;
};

}  // namespace mcore_bridge
