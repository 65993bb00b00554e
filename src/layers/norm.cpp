#include "layers/norm.h"

#include <ATen/ATen.h>

namespace mcore_bridge {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon, bool zero_centered) {
  return at::rms_norm(x, {x.size(-1)}, zero_centered ? weight + 1 : weight, epsilon);
}

Norm::Norm(NormOptions options, at::TensorOptions tensor_options)
    : options_(options), weight_(at::empty({options.size}, tensor_options).requires_grad_(true)) {}

std::vector<NamedParameter> Norm::own_parameters() const {
  return {{"weight", weight_, {.sum_over_tp = options_.sum_over_tp, .no_weight_decay = true}}};
}

at::Tensor Norm::forward(const at::Tensor& x) const {
  return rms_norm(x, weight_, options_.epsilon, options_.zero_centered);
}

}  // namespace mcore_bridge
