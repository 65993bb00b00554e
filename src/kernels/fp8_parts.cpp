#include "kernels/fp8_parts.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "kernels/device.h"
#include "kernels/fp8_reference.h"

namespace mcore_bridge {
namespace {

constexpr int64_t kWindow = cuda::kFp8PartsWindow;

/// The part as whole blocks, zeros around it: [rows of blocks, 128, blocks, 128]; with one magnitude for all, one block
/// of the numbers there are.
struct Blocks {
  at::Tensor values, amax;  ///< amax: [rows of blocks, blocks], a view
  int64_t before = 0;       ///< zeros in front
  Blocks(const Fp8Part& part, const at::Tensor& all, at::ScalarType dtype) {
    const auto length = part.values.numel();
    const auto rounded = part.values.to(dtype).to(at::kFloat);
    if (part.stride == 0) {
      values = rounded.view({1, 1, 1, length});
      amax = all.narrow(0, part.first, 1).view({1, 1});
      return;
    }
    const auto unit = kWindow * part.columns, across = part.columns / kWindow;
    const auto first = part.begin / unit, last = (part.begin + length + unit - 1) / unit;
    before = part.begin - first * unit;
    values = at::constant_pad_nd(rounded, {before, last * unit - part.begin - length});
    values = values.view({last - first, kWindow, across, kWindow});
    amax = all.as_strided({last - first, across}, {part.stride, 1}, part.first + first * part.stride);
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
    return launch_parts(parts, amax,
                        [&](const auto& p, auto stream) { cuda::fp8_parts_amax(p, type_of(dtype), stream); });
  }
  for (const auto& part : parts) {
    const Blocks blocks(part, amax, dtype);
    auto own = blocks.amax;
    at::maximum_out(own, own, magnitude(blocks.values, {1, 3}));
  }
}

void fp8_quantize(const std::vector<Fp8Part>& parts, const at::Tensor& amax, at::ScalarType dtype) {
  if (amax.is_cuda()) {
    return launch_parts(parts, amax,
                        [&](const auto& p, auto stream) { cuda::fp8_parts_quantize(p, type_of(dtype), stream); });
  }
  for (const auto& part : parts) {
    const Blocks blocks(part, amax, dtype);
    const auto factor = factor_of(blocks.amax, at::kFloat8_e4m3fn).view({-1, 1, blocks.amax.size(1), 1});
    const auto codes = rounded(blocks.values * factor, at::kFloat8_e4m3fn).view({-1});
    part.codes.copy_(codes.narrow(0, blocks.before, part.codes.numel()));
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
