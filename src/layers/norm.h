// RMSNorm.
#pragma once

#include "kernels/rms_norm.h"
#include "layers/module.h"

namespace mcore_bridge {

/// RMSNorm for autograd: keeps x and one number a row.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon, bool zero_centered);

struct NormOptions {
  int64_t size = 0;
  double epsilon = 1e-5;
  bool zero_centered = false;
  bool sum_over_tp = false;  ///< its gradient is partial on each tensor-parallel rank
};

class Norm : public Module {
 public:
  Norm(NormOptions options, at::TensorOptions tensor_options);
  std::string kind() const override { return "RMSNorm"; }
  std::vector<NamedParameter> own_parameters() const override;
  /// Keeps x and one number a row for backward.
  at::Tensor forward(const at::Tensor& x) const;
  const at::Tensor& weight() const { return weight_; }
  RmsNormOptions options() const { return {.epsilon = options_.epsilon, .zero_centered = options_.zero_centered}; }

 private:
  NormOptions options_;
  at::Tensor weight_;
};

}  // namespace mcore_bridge
