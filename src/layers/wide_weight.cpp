#include "layers/wide_weight.h"

#include <ATen/ATen.h>

namespace mcore_bridge {

void WideWeight::keep(const at::Tensor& values, const at::Tensor& codes) {
  values_.reset();  // its memory first
  values_ = values.detach().to(values.options().device(at::kCPU), /*non_blocking=*/false, /*copy=*/true);
  version_ = codes._version();
}

void WideWeight::set_exact(const at::Tensor& codes) {
  values_.reset();
  version_ = codes._version();
}

void WideWeight::forget() {
  values_.reset();
  version_.reset();
}

bool WideWeight::known(const at::Tensor& codes) const { return version_ && *version_ == codes._version(); }

at::Tensor WideWeight::values(const at::Tensor& codes) const {
  if (!values_.defined() || !known(codes)) return {};
  return values_.to(values_.options().device(codes.device()), /*non_blocking=*/false, /*copy=*/true);
}

}  // namespace mcore_bridge
