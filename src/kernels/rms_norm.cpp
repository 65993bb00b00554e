#include "kernels/rms_norm.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "kernels/device.h"
#include "kernels/room.h"

namespace mcore_bridge {
namespace {

/// Blocks of the backward: one a row, unless each leaves a row of partial sums. Those are as many as fill a Hopper's
/// 132 multiprocessors: four for each when a row is 4,096 wide, more of narrower ones.
int64_t backward_blocks(int64_t rows, int64_t columns, bool partial_sums) {
  return partial_sums ? std::min(rows, 528 * std::clamp<int64_t>(4096 / columns, 1, 4)) : rows;
}

std::optional<cuda::Type> norm_type(const at::Tensor& x, const at::Tensor& weight) {
  const auto type = kernel_type(x);
  if (!type || weight.scalar_type() != x.scalar_type() || !vector_rows(x.size(-1), *type) ||
      x.size(-1) > cuda::max_norm_columns(*type) || x.numel() == 0)
    return std::nullopt;
  return type;
}

at::ScalarType wide(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

at::Tensor scale_of(const at::Tensor& weight, at::ScalarType type, const RmsNormOptions& options) {
  const auto scale = weight.to(type);
  return options.zero_centered ? scale + 1 : scale;
}

at::Tensor reference_apply(const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight,
                           const RmsNormOptions& options) {
  return (x.to(wide(x)) * rstd.unsqueeze(-1)).mul_(scale_of(weight, wide(x), options)).to(x.scalar_type());
}

cuda::RmsNorm arguments(const at::Tensor& x, const at::Tensor& weight, const RmsNormOptions& options) {
  return {.rows = x.numel() / x.size(-1),
          .columns = x.size(-1),
          .x = pointer(x),
          .weight = pointer(weight),
          .epsilon = static_cast<float>(options.epsilon),
          .zero_centered = options.zero_centered};
}

}  // namespace

RmsNormOutput rms_norm_forward(const at::Tensor& given, const at::Tensor& delta, const at::Tensor& weight,
                               const RmsNormOptions& options, int64_t room) {
  const auto type = norm_type(given, weight);
  if (!type) {
    const auto sum = delta.defined() ? given + delta : given;
    const auto rstd = sum.to(wide(sum)).square().mean(-1).add_(options.epsilon).rsqrt_();
    return {moved_to_room(reference_apply(sum, rstd, weight, options), room), sum, rstd};
  }
  const c10::DeviceGuard guard(given.device());
  const auto x = readable(given), other = readable(delta);
  RmsNormOutput result{empty_with_room(x.sizes(), room, x.options()),
                       delta.defined() ? at::empty(x.sizes(), x.options()) : x,
                       at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat))};
  auto p = arguments(x, weight, options);
  p.delta = pointer(other);
  p.normed = mutable_pointer(result.normed);
  p.normed_stride = x.size(-1) + room;
  p.sum = delta.defined() ? mutable_pointer(result.sum) : nullptr;
  p.rstd = result.rstd.mutable_data_ptr<float>();
  cuda::rms_norm_forward(p, *type, current_stream(x));
  return result;
}

at::Tensor rms_norm_apply(const at::Tensor& given, const at::Tensor& rstd, const at::Tensor& weight,
                          const RmsNormOptions& options) {
  const auto type = norm_type(given, weight);
  if (!type) return reference_apply(given, rstd, weight, options);
  const c10::DeviceGuard guard(given.device());
  const auto x = readable(given);
  auto normed = at::empty(x.sizes(), x.options());
  auto p = arguments(x, weight, options);
  p.normed = mutable_pointer(normed);
  p.rstd = rstd.mutable_data_ptr<float>();
  cuda::rms_norm_apply(p, *type, current_stream(x));
  return normed;
}

RmsNormGradients rms_norm_backward(const at::Tensor& given_grad, const at::Tensor& given_x, const at::Tensor& rstd,
                                   const at::Tensor& weight, const at::Tensor& grad_residual,
                                   const RmsNormOptions& options, bool want_weight, bool want_normed) {
  RmsNormGradients result;
  const auto type = norm_type(given_x, weight);
  if (!type) {
    const auto normalised = given_x.to(wide(given_x)) * rstd.unsqueeze(-1);
    const auto grad = given_grad.to(wide(given_x));
    const auto scaled = grad * scale_of(weight, wide(given_x), options);
    auto grad_x = (scaled - normalised * (scaled * normalised).mean(-1, true)) * rstd.unsqueeze(-1);
    if (grad_residual.defined()) grad_x.add_(grad_residual);
    result.x = grad_x.to(given_x.scalar_type());
    if (want_weight)
      result.weight = (grad * normalised).reshape({-1, given_x.size(-1)}).sum(0).to(weight.scalar_type());
    if (want_normed) result.normed = reference_apply(given_x, rstd, weight, options);
    return result;
  }
  const c10::DeviceGuard guard(given_x.device());
  const auto grad = readable(given_grad), x = readable(given_x), residual = readable(grad_residual);
  const auto rows = x.numel() / x.size(-1), blocks = backward_blocks(rows, x.size(-1), want_weight);
  result.x = at::empty(x.sizes(), x.options());
  if (want_normed) result.normed = at::empty(x.sizes(), x.options());
  at::Tensor partials;
  if (want_weight) partials = at::empty({blocks, x.size(-1)}, x.options().dtype(at::kFloat));
  cuda::rms_norm_backward({.rows = rows,
                           .columns = x.size(-1),
                           .blocks = blocks,
                           .grad = pointer(grad),
                           .x = pointer(x),
                           .weight = pointer(weight),
                           .grad_residual = pointer(residual),
                           .rstd = rstd.const_data_ptr<float>(),
                           .grad_x = mutable_pointer(result.x),
                           .normed = mutable_pointer(result.normed),
                           .weight_partials = want_weight ? partials.mutable_data_ptr<float>() : nullptr,
                           .zero_centered = options.zero_centered},
                          *type, current_stream(x));
  if (want_weight) result.weight = at::sum(partials, 0, false, weight.scalar_type());
  return result;
}

}  // namespace mcore_bridge
