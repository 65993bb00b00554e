// RMSNorm.
#pragma once

#include "kernels/rms_norm.h"
#include "layers/module.h"

namespace mcore_bridge {

/// RMSNorm for autograd: keeps x and one number a row.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon, bool zero_centered);
/// What rms_norm of `rows` vectors of `width` keeps: the vectors, unless shape.input_kept, and one number for each.
Footprint rms_norm_footprint(int64_t rows, int64_t width, bool weight_grad, const ActivationShape& shape);

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
  /// As if every position were one row of the norm's width.
  Footprint footprint(const ActivationShape& shape) const override;
  const at::Tensor& weight() const { return weight_; }
  RmsNormOptions options() const { return {.epsilon = options_.epsilon, .zero_centered = options_.zero_centered}; }

 private:
  NormOptions options_;
  at::Tensor weight_;
};

}  // namespace mcore_bridge
