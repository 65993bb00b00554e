#include "kernels/split_qkv.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "kernels/device.h"

namespace mcore_bridge {

at::Tensor rotate_heads(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool interleaved,
                        bool inverse) {
  const auto half = cos.size(-1), rotated = 2 * half;
  auto out = at::empty(x.sizes(), x.options());
  auto halves = [&](const at::Tensor& t) {
    return interleaved ? std::pair{t.slice(-1, 0, rotated, 2), t.slice(-1, 1, rotated, 2)}
                       : std::pair{t.narrow(-1, 0, half), t.narrow(-1, half, half)};
  };
  const auto [x1, x2] = halves(x);
  auto [y1, y2] = halves(out);
  at::mul_out(y1, x1, cos);
  at::mul_out(y2, x2, cos);
  const double sign = inverse ? -1 : 1;
  y1.addcmul_(x2, sin, -sign);
  y2.addcmul_(x1, sin, sign);
  if (rotated < x.size(-1))
    out.narrow(-1, rotated, x.size(-1) - rotated).copy_(x.narrow(-1, rotated, x.size(-1) - rotated));
  return out;
}

namespace {

constexpr int64_t kBackwardBlocks = 1056;

std::optional<cuda::Type> split_type(const at::Tensor& mixed, const SplitQkvOptions& o) {
  const auto type = kernel_type(mixed);
  // The kernels count heads in 32 bits.
  const bool fits_width =
      type && mixed.numel() > 0 && cuda::split_qkv_width(o.d) && mixed.numel() / o.d < (int64_t{1} << 31);
  if (!fits_width) return std::nullopt;
  if (o.q_weight.defined() && o.q_weight.scalar_type() != mixed.scalar_type()) return std::nullopt;
  if (!o.cos.defined()) return type;
  const auto half = o.cos.size(-1);
  const bool fits = o.interleaved || half % (o.d / 16) == 0;  // 16 lanes hold a head
  return fits && o.cos.scalar_type() == mixed.scalar_type() ? type : std::nullopt;
}

/// The three parts of every group as views [s, b, g, p, d], [s, b, g, d], [s, b, g, d].
Qkv parts_of(const at::Tensor& mixed, const SplitQkvOptions& o) {
  const auto grouped = mixed.view({mixed.size(0), mixed.size(1), o.groups, o.per_group + 2, o.d});
  return {grouped.narrow(3, 0, o.per_group), grouped.select(3, o.per_group), grouped.select(3, o.per_group + 1)};
}

cuda::SplitQkv arguments(const at::Tensor& like, const SplitQkvOptions& o, const at::Tensor& cos,
                         const at::Tensor& sin) {
  return {.tokens = like.size(0) * like.size(1),
          .batch = like.size(1),
          .groups = o.groups,
          .per_group = o.per_group,
          .d = o.d,
          .half = cos.defined() ? cos.size(-1) : 0,
          .interleaved = o.interleaved,
          .table_per_batch = cos.defined() && cos.size(1) > 1,
          .q_weight = pointer(o.q_weight),
          .k_weight = pointer(o.k_weight),
          .cos = pointer(cos),
          .sin = pointer(sin),
          .epsilon = static_cast<float>(o.norm.epsilon),
          .zero_centered = o.norm.zero_centered};
}

}  // namespace

Qkv split_qkv_forward(const at::Tensor& given, const SplitQkvOptions& o, bool view_v) {
  const auto s = given.size(0), b = given.size(1);
  const auto type = split_type(given, o);
  const auto mixed = type ? readable(given) : given;
  auto parts = parts_of(mixed, o);
  if (!type) {
    auto finish = [&](at::Tensor x, const at::Tensor& weight) {
      if (weight.defined()) x = rms_norm_forward(x, {}, weight, o.norm).normed;
      return o.cos.defined() ? rotate_heads(x, o.cos, o.sin, o.interleaved, false) : x;
    };
    return {finish(parts.q.reshape({s, b, o.groups * o.per_group, o.d}), o.q_weight), finish(parts.k, o.k_weight),
            view_v ? parts.v : parts.v.contiguous()};
  }
  const c10::DeviceGuard guard(mixed.device());
  Qkv result{at::empty({s, b, o.groups * o.per_group, o.d}, mixed.options()),
             at::empty({s, b, o.groups, o.d}, mixed.options()),
             view_v ? parts.v : at::empty({s, b, o.groups, o.d}, mixed.options())};
  const auto cos = readable(o.cos), sin = readable(o.sin);
  auto p = arguments(mixed, o, cos, sin);
  p.mixed = pointer(mixed);
  p.q = mutable_pointer(result.q);
  p.k = mutable_pointer(result.k);
  p.v = view_v ? nullptr : mutable_pointer(result.v);
  cuda::split_qkv_forward(p, *type, current_stream(mixed));
  return result;
}

SplitQkvGradients split_qkv_backward(const Qkv& grads, const at::Tensor& mixed, const SplitQkvOptions& o,
                                     bool want_weights) {
  const auto s = grads.q.size(0), b = grads.q.size(1);
  SplitQkvGradients result;
  result.mixed = at::empty({s, b, o.groups * (o.per_group + 2) * o.d}, grads.q.options());
  want_weights = want_weights && o.q_weight.defined();
  const auto type = split_type(result.mixed, o);
  if (!type) {
    auto into = parts_of(result.mixed, o);
    auto finish = [&](at::Tensor grad, const at::Tensor& raw, const at::Tensor& weight, at::Tensor& grad_weight) {
      if (o.cos.defined()) grad = rotate_heads(grad, o.cos, o.sin, o.interleaved, true);
      if (!weight.defined()) return grad;
      const auto rstd = rms_norm_forward(raw, {}, weight, o.norm).rstd;
      const auto back = rms_norm_backward(grad, raw, rstd, weight, {}, o.norm, want_weights, false);
      grad_weight = back.weight;
      return back.x;
    };
    const auto raw = o.q_weight.defined() ? parts_of(mixed, o) : Qkv{};
    const auto raw_q = raw.q.defined() ? raw.q.reshape(grads.q.sizes()) : at::Tensor();
    into.q.copy_(finish(grads.q, raw_q, o.q_weight, result.q_weight).view(into.q.sizes()));
    into.k.copy_(finish(grads.k, raw.k, o.k_weight, result.k_weight));
    into.v.copy_(grads.v);
    return result;
  }
  const c10::DeviceGuard guard(grads.q.device());
  const auto q = readable(grads.q), k = readable(grads.k), v = readable(grads.v), cos = readable(o.cos),
             sin = readable(o.sin);
  const auto raw = o.q_weight.defined() ? readable(mixed) : at::Tensor();
  cuda::SplitQkvBackward p{.forward = arguments(result.mixed, o, cos, sin),
                           .grad_mixed = mutable_pointer(result.mixed),
                           .blocks = kBackwardBlocks};
  p.forward.mixed = pointer(raw);
  p.forward.q = const_cast<void*>(pointer(q));
  p.forward.k = const_cast<void*>(pointer(k));
  p.forward.v = const_cast<void*>(pointer(v));
  at::Tensor partials;
  if (want_weights) {
    partials = at::empty({p.blocks, 2, o.d}, q.options().dtype(at::kFloat));
    p.weight_partials = partials.mutable_data_ptr<float>();
  }
  cuda::split_qkv_backward(p, *type, current_stream(q));
  if (want_weights) {
    const auto sums = at::sum(partials, 0, false, o.q_weight.scalar_type());
    result.q_weight = sums[0];
    result.k_weight = sums[1];
  }
  return result;
}

}  // namespace mcore_bridge
