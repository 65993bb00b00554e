#include "kernels/fp8.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "kernels/device.h"
#include "kernels/fp8_reference.h"

namespace mcore_bridge {
namespace {

constexpr int64_t kBlock = 128, kWorkspace = 32 << 20;

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// [rows, columns] -> [blocks, 128, columns], zeros behind.
at::Tensor row_blocks(const at::Tensor& x) {
  const auto rows = up_to(x.size(0), kBlock);
  return at::constant_pad_nd(x, {0, 0, 0, rows - x.size(0)}).view({rows / kBlock, kBlock, x.size(1)});
}

/// One scale for 128 numbers of a row.
Fp8Matrix by_rows(const at::Tensor& x, at::ScalarType format) {
  const auto blocks = row_blocks(x.t());  // [k / 128, 128, rows]
  const auto factor = factor_of(magnitude(blocks, {1}), format);
  const auto values = rounded(blocks * factor.unsqueeze(1), format).view({-1, x.size(0)}).narrow(0, 0, x.size(1));
  return {values.t().contiguous(), scale_of(factor), Fp8Scaling::kRows};
}

/// Blocks' scales as kernels take them.
at::Tensor grid(const at::Tensor& scale) {
  return at::constant_pad_nd(scale, {0, up_to(scale.size(1), 4) - scale.size(1)}).contiguous();
}

/// What quantize_kernel computes, x in fp32 and padded.
Fp8Pair reference_pair(const at::Tensor& x, const Fp8Quantization& how) {
  Fp8Pair result;
  if (how.scaling == Fp8Scaling::kRows) {
    if (how.straight) result.straight = by_rows(x, how.format);
    if (how.turned) result.turned = by_rows(x.t(), how.format);
    return result;
  }
  at::Tensor values, scale;
  if (how.scaling == Fp8Scaling::kTensor) {
    if (how.amax.defined()) fp8_raise_amax(x, how.amax);
    const auto factor = factor_of(how.reference, how.format);
    scale = scale_of(factor);
    values = rounded(x * factor, how.format);
    if (how.straight) result.straight = {values, scale, how.scaling};
    if (how.turned) result.turned = {values.t().contiguous(), scale, how.scaling};
    return result;
  }
  const auto rows = x.size(0) / kBlock, columns = x.size(1) / kBlock;
  const auto blocks = x.view({rows, kBlock, columns, kBlock});
  const auto factor = factor_of(magnitude(blocks, {1, 3}), how.format);
  scale = scale_of(factor);
  values = rounded(blocks * factor.view({rows, 1, columns, 1}), how.format).view(x.sizes());
  if (how.straight) result.straight = {values, grid(scale), how.scaling};
  if (how.turned) result.turned = {values.t().contiguous(), grid(scale.t()), how.scaling};
  return result;
}

at::Tensor spread(const Fp8Matrix& matrix) {
  const auto rows = matrix.values.size(0), k = matrix.values.size(1);
  switch (matrix.scaling) {
    case Fp8Scaling::kTensor:
      return matrix.scale;
    case Fp8Scaling::kRows:
      return matrix.scale.t().repeat_interleave(kBlock, 1).narrow(1, 0, k);
    default:
      return matrix.scale.repeat_interleave(kBlock, 0).narrow(0, 0, rows).repeat_interleave(kBlock, 1).narrow(1, 0, k);
  }
}

void multiply(const Fp8Matrix& a, const Fp8Matrix& b, at::Tensor& to, bool accumulate) {
  const c10::DeviceGuard guard(to.device());
  const auto workspace = at::empty({kWorkspace}, to.options().dtype(at::kByte));
  cuda::fp8_matmul({.m = a.values.size(0),
                    .n = b.values.size(0),
                    .k = a.values.size(1),
                    .a = a.values.const_data_ptr(),
                    .b = b.values.const_data_ptr(),
                    .scale_a = a.scale.const_data_ptr<float>(),
                    .scale_b = b.scale.const_data_ptr<float>(),
                    .scaling_a = a.scaling,
                    .scaling_b = b.scaling,
                    .e5m2_a = a.values.scalar_type() == at::kFloat8_e5m2,
                    .e5m2_b = b.values.scalar_type() == at::kFloat8_e5m2,
                    .to = to.mutable_data_ptr(),
                    .accumulate = accumulate,
                    .workspace = workspace.mutable_data_ptr(),
                    .workspace_bytes = kWorkspace},
                   *kernel_type(to), current_stream(to));
}

/// Whether kernels may write all rows of a's padded product where `to` begins.
bool has_room(const at::Tensor& to, int64_t rows) {
  const auto room = static_cast<int64_t>(to.storage().nbytes() / to.element_size()) - to.storage_offset();
  return to.is_contiguous() && aligned(to) && room >= rows * to.size(1);
}

}  // namespace

Fp8Pair fp8_quantize(const at::Tensor& given, const Fp8Quantization& how) {
  const auto multiple = fp8_row_multiple(how.scaling);
  const auto rows = given.size(0), columns = given.size(1), padded = up_to(rows, multiple);
  TORCH_INTERNAL_ASSERT(columns % multiple == 0, "fp8_quantize: ", columns, " columns");
  if (!given.is_cuda()) {
    return reference_pair(at::constant_pad_nd(given.to(at::kFloat), {0, 0, 0, padded - rows}).contiguous(), how);
  }
  const c10::DeviceGuard guard(given.device());
  const auto x = readable(given);
  const auto bytes = x.options().dtype(how.format), floats = x.options().dtype(at::kFloat);
  Fp8Pair result;
  cuda::Fp8Quantize p{.rows = rows,
                      .columns = columns,
                      .padded = padded,
                      .scaling = how.scaling,
                      .e5m2 = how.format == at::kFloat8_e5m2,
                      .x = pointer(x)};
  if (how.straight) result.straight = {at::empty({padded, columns}, bytes), {}, how.scaling};
  if (how.turned) result.turned = {at::empty({columns, padded}, bytes), {}, how.scaling};
  p.q = static_cast<uint8_t*>(mutable_pointer(result.straight.values));
  p.q_t = static_cast<uint8_t*>(mutable_pointer(result.turned.values));
  auto scale = [&](Fp8Matrix& matrix, at::IntArrayRef sizes) {
    matrix.scale = at::empty(sizes, floats);
    return matrix.scale.mutable_data_ptr<float>();
  };
  switch (how.scaling) {
    case Fp8Scaling::kTensor: {
      const auto one = at::empty({1}, floats);
      result.straight.scale = result.turned.scale = one;
      p.scale = one.mutable_data_ptr<float>();
      p.reference = how.reference.const_data_ptr<float>();
      p.amax = how.amax.defined() ? how.amax.mutable_data_ptr<float>() : nullptr;
      break;
    }
    case Fp8Scaling::kRows:
      if (how.straight) p.scale = scale(result.straight, {columns / kBlock, padded});
      if (how.turned) p.scale_t = scale(result.turned, {padded / kBlock, columns});
      break;
    case Fp8Scaling::kBlocks:
      p.scale_stride = up_to(columns / kBlock, 4);
      p.scale_t_stride = up_to(padded / kBlock, 4);
      if (how.straight) p.scale = scale(result.straight, {padded / kBlock, p.scale_stride});
      if (how.turned) p.scale_t = scale(result.turned, {columns / kBlock, p.scale_t_stride});
      break;
  }
  cuda::fp8_quantize(p, *kernel_type(x), current_stream(x));
  return result;
}

void fp8_raise_amax(const at::Tensor& given, const at::Tensor& amax) {
  if (!given.is_cuda()) {
    at::maximum_out(const_cast<at::Tensor&>(amax), amax, magnitude(given.to(at::kFloat), {}).reshape({1}));
    return;
  }
  const c10::DeviceGuard guard(given.device());
  const auto x = readable(given);
  cuda::fp8_amax(pointer(x), x.numel(), amax.mutable_data_ptr<float>(), *kernel_type(x), current_stream(x));
}

Fp8Matrix fp8_turned(const Fp8Matrix& matrix) {
  TORCH_INTERNAL_ASSERT(matrix.scaling != Fp8Scaling::kRows);
  const bool blocks = matrix.scaling == Fp8Scaling::kBlocks;
  const auto rows = matrix.values.size(0), columns = matrix.values.size(1);
  if (!matrix.values.is_cuda()) {
    const auto scale = blocks ? grid(matrix.scale.narrow(1, 0, columns / kBlock).t()) : matrix.scale;
    return {matrix.values.t().contiguous(), scale, matrix.scaling};
  }
  const c10::DeviceGuard guard(matrix.values.device());
  Fp8Matrix result{at::empty({columns, rows}, matrix.values.options()), matrix.scale, matrix.scaling};
  cuda::Fp8Turn p{.rows = rows,
                  .columns = columns,
                  .q = static_cast<const uint8_t*>(matrix.values.const_data_ptr()),
                  .q_t = static_cast<uint8_t*>(result.values.mutable_data_ptr())};
  if (blocks) {
    result.scale = at::empty({columns / kBlock, up_to(rows / kBlock, 4)}, matrix.scale.options());
    p.scale = matrix.scale.const_data_ptr<float>();
    p.scale_t = result.scale.mutable_data_ptr<float>();
    p.scale_stride = matrix.scale.size(1);
    p.scale_t_stride = result.scale.size(1);
  }
  cuda::fp8_turn(p, current_stream(matrix.values));
  return result;
}

at::Tensor fp8_dequantize(const Fp8Matrix& matrix) { return matrix.values.to(at::kFloat) * spread(matrix); }

at::Tensor fp8_product(int64_t rows, int64_t columns, Fp8Scaling scaling, const at::TensorOptions& options) {
  return at::empty({up_to(rows, fp8_row_multiple(scaling)), columns}, options).narrow(0, 0, rows);
}

at::Tensor fp8_matmul(const Fp8Matrix& a, const Fp8Matrix& b, int64_t rows, at::ScalarType dtype,
                      const at::Tensor& onto) {
  if (!a.values.is_cuda()) {
    auto product = at::mm(fp8_dequantize(a), fp8_dequantize(b).t()).narrow(0, 0, rows);
    if (onto.defined()) product = product + onto.to(at::kFloat);
    return product.to(dtype).contiguous();
  }
  auto to = onto;
  if (!to.defined() || !has_room(to, a.values.size(0))) {
    to = fp8_product(rows, b.values.size(0), a.scaling, a.values.options().dtype(dtype));
    if (onto.defined()) to.copy_(onto);
  }
  multiply(a, b, to, onto.defined());
  return to;
}

void fp8_accumulate(at::Tensor sum, const Fp8Matrix& a, const Fp8Matrix& b, bool accumulate) {
  if (!a.values.is_cuda()) {
    const auto product = at::mm(fp8_dequantize(a), fp8_dequantize(b).t());
    if (accumulate) {
      sum.add_(product);
    } else {
      sum.copy_(product);
    }
  } else if (sum.is_contiguous() && aligned(sum)) {
    multiply(a, b, sum, accumulate);
  } else {
    auto product = at::empty(sum.sizes(), sum.options());
    multiply(a, b, product, false);
    if (accumulate) {
      sum.add_(product);
    } else {
      sum.copy_(product);
    }
  }
}

std::string fp8_missing(c10::Device device, bool blocks) {
  if (device.is_cpu() || device.is_meta()) return {};
  if (!device.is_cuda()) return "FP8 has kernels for NVIDIA GPUs and a reference on the CPU, none for " + device.str();
  if (!cuda::built()) return "this build has no CUDA kernels, which FP8 needs; build with MCB_CUDA=ON";
  const c10::DeviceGuard guard(device);
  const auto capability = cuda::compute_capability();
  const auto found =
      "this GPU has compute capability " + std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  if (capability < 89) return found + ", FP8 needs 8.9 or more (Ada, Hopper, Blackwell); train in bfloat16 there";
  if (blocks && !cuda::fp8_has_blocks()) return "fp8_recipe blockwise needs a build with CUDA 12.9 or later";
  if (blocks && capability != 90)
    return found + ", fp8_recipe blockwise needs 9.0 (Hopper); use tensorwise or delayed there";
  return {};
}

}  // namespace mcore_bridge
