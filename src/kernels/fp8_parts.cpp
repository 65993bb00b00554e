#include "kernels/fp8_parts.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "kernels/device.h"
#include "kernels/fp8_reference.h"

namespace mcore_bridge {
namespace {

constexpr int64_t kWindow = cuda::kFp8PartsWindow;

/// The part as whole windows of 128 numbers, zeros around it, and which magnitude each of them goes by.
struct Windows {
  at::Tensor values, magnitudes;
  int64_t before = 0;  ///< zeros in front
  Windows(const Fp8Part& part, at::ScalarType dtype) {
    const auto length = part.values.numel(), start = part.begin / kWindow;
    const auto end = (part.begin + length + kWindow - 1) / kWindow;
    before = part.begin - start * kWindow;
    values = at::constant_pad_nd(part.values.to(dtype).to(at::kFloat),
                                 {before, end * kWindow - part.begin - length})
                 .view({-1, kWindow});
    const auto number = at::arange(start, end, at::TensorOptions(part.values.device()).dtype(at::kLong));
    if (part.stride == 0) {
      magnitudes = at::full_like(number, part.first);
    } else {
      const auto across = part.columns / kWindow;
      magnitudes = at::floor_divide(number, across * kWindow) * part.stride + number.remainder(across) + part.first;
    }
  }
};

cuda::Type type_of(at::ScalarType dtype) {
  return dtype == at::kFloat ? cuda::Type::kFloat : dtype == at::kHalf ? cuda::Type::kHalf : cuda::Type::kBFloat16;
}

/// In as few launches as their tables allow.
template <class Launch>
void launch_parts(const std::vector<Fp8Part>& parts, const at::Tensor& amax, Launch launch) {
  const c10::DeviceGuard guard(amax.device());
  cuda::Fp8Parts p{.count = 0, .first_block = {0}, .amax = amax.mutable_data_ptr<float>()};
  for (const auto& part : parts) {
    const auto length = part.values.numel();
    if (length == 0) continue;
    const auto at = p.count++;
    p.values[at] = part.values.const_data_ptr<float>();
    p.codes[at] = static_cast<uint8_t*>(part.codes.mutable_data_ptr());
    p.begin[at] = part.begin;
    p.end[at] = part.begin + length;
    p.columns[at] = part.columns;
    p.first[at] = part.first;
    p.stride[at] = part.stride;
    const auto looked_at = part.begin % kWindow + length;
    p.first_block[at + 1] =
        p.first_block[at] + static_cast<int>((looked_at + cuda::kFp8PartsBlock - 1) / cuda::kFp8PartsBlock);
    if (p.count < cuda::Fp8Parts::kMaxParts) continue;
    launch(p, current_stream(amax));
    p.count = 0;
  }
  if (p.count > 0) launch(p, current_stream(amax));
}

}  // namespace

void fp8_raise_amax(const std::vector<Fp8Part>& parts, const at::Tensor& amax, at::ScalarType dtype) {
  if (amax.is_cuda()) {
    return launch_parts(parts, amax, [&](const auto& p, auto stream) { cuda::fp8_parts_amax(p, type_of(dtype), stream); });
  }
  for (const auto& part : parts) {
    const Windows windows(part, dtype);
    at::Tensor(amax).index_reduce_(0, windows.magnitudes, magnitude(windows.values, {1}), "amax");
  }
}

void fp8_quantize(const std::vector<Fp8Part>& parts, const at::Tensor& amax, at::ScalarType dtype) {
  if (amax.is_cuda()) {
    return launch_parts(parts, amax,
                        [&](const auto& p, auto stream) { cuda::fp8_parts_quantize(p, type_of(dtype), stream); });
  }
  for (const auto& part : parts) {
    const Windows windows(part, dtype);
    const auto factor = factor_of(amax.index_select(0, windows.magnitudes), at::kFloat8_e4m3fn).unsqueeze(1);
    const auto codes = rounded(windows.values * factor, at::kFloat8_e4m3fn).view({-1});
    part.codes.copy_(codes.narrow(0, windows.before, part.codes.numel()));
  }
}

void fp8_write_scales(const std::vector<Fp8ScalePlace>& places, const at::Tensor& amax) {
  if (!amax.is_cuda()) {
    for (const auto& [scale, first] : places) {
      const auto own = amax.narrow(0, first, scale.numel()).view(scale.sizes());
      scale.copy_(scale_of(factor_of(own, at::kFloat8_e4m3fn)));
    }
    return;
  }
  const c10::DeviceGuard guard(amax.device());
  cuda::Fp8Scales p{.count = 0, .amax = amax.const_data_ptr<float>()};
  for (const auto& [scale, first] : places) {
    const auto at = p.count++;
    p.scale[at] = scale.mutable_data_ptr<float>();
    p.first[at] = first;
    p.numbers[at] = static_cast<int>(scale.numel());
    if (p.count < cuda::Fp8Scales::kMaxWeights) continue;
    cuda::fp8_scales(p, current_stream(amax));
    p.count = 0;
  }
  if (p.count > 0) cuda::fp8_scales(p, current_stream(amax));
}

}  // namespace mcore_bridge
