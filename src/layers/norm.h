// RMSNorm.
#pragma once

#include "layers/module.h"

namespace mcore_bridge {

/// x / sqrt(mean(x^2) + epsilon) * weight over the last dim, computed in fp32; (1 + weight) when zero-centred.
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
  at::Tensor forward(const at::Tensor& x) const;

 private:
  NormOptions options_;
  at::Tensor weight_;
};

}  // namespace mcore_bridge
