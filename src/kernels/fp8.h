// FP8 matrices: values of 8 bits with fp32 numbers (scales) that they count, made from wider ones and multiplied with
// one another. On the CPU, and as the reference of the kernels: the same roundings, products in fp32.
//
// A number's scale is 1 / (largest / amax), largest being 448 (e4m3) or 57344 (e5m2) and amax the largest magnitude
// it is shared by, as in the published blockwise checkpoints (bridge/formats/fp8.h).
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/cuda/fp8.h"

namespace mcore_bridge {

using Fp8Scaling = cuda::Fp8Scaling;

/// A matrix whose rows lie along the dimension that products sum over.
struct Fp8Matrix {
  /// [rows, k] float8_e4m3fn or float8_e5m2; beyond the real rows (or, turned, the real columns) zeros, so that both
  /// extents are multiples of what the tensor cores take.
  at::Tensor values;
  /// kTensor: [1]. kRows: [k / 128, rows]. kBlocks: [rows / 128, k / 128 rounded up to 4], what is beyond unused.
  at::Tensor scale;
  Fp8Scaling scaling = Fp8Scaling::kTensor;
  bool defined() const { return values.defined(); }
};

struct Fp8Quantization {
  Fp8Scaling scaling = Fp8Scaling::kTensor;
  at::ScalarType format = at::kFloat8_e4m3fn;
  bool straight = true, turned = false;  ///< which of the two to make
  at::Tensor reference;  ///< kTensor: [1] float, the amax that the scale is made for; magnitudes above are clipped
  at::Tensor amax;       ///< kTensor: [1] float, raised to the largest finite-or-infinite magnitude; or undefined
};

struct Fp8Pair {
  Fp8Matrix straight;  ///< of x
  Fp8Matrix turned;    ///< of x^T; kRows: with scales of its own
};

/// Rows are padded to a multiple of this.
constexpr int64_t fp8_row_multiple(Fp8Scaling scaling) { return scaling == Fp8Scaling::kTensor ? 16 : 128; }
/// Columns (and the rows of weights) must be one of this.
constexpr int64_t fp8_multiple(Fp8Scaling scaling) { return fp8_row_multiple(scaling); }

/// x [rows, columns] of a floating type.
Fp8Pair fp8_quantize(const at::Tensor& x, const Fp8Quantization& how);
/// Raises `amax` ([1] float) to the largest magnitude of x.
void fp8_raise_amax(const at::Tensor& x, const at::Tensor& amax);
/// x^T of a matrix with one scale or one a block, its extents multiples of fp8_multiple: the same numbers.
Fp8Matrix fp8_turned(const Fp8Matrix& matrix);
/// values * scale, fp32.
at::Tensor fp8_dequantize(const Fp8Matrix& matrix);

/// a b^T, summed in fp32: [rows of a, rows of b] of `dtype`, of which the first `rows` rows are given back. `onto` is
/// added (and overwritten where memory allows it) when it is defined: [rows, rows of b]. Never cuBLAS's "fast
/// accumulation", which keeps fewer bits between instructions and is no faster at the sizes of models.
at::Tensor fp8_matmul(const Fp8Matrix& a, const Fp8Matrix& b, int64_t rows, at::ScalarType dtype,
                      const at::Tensor& onto);
/// Memory for `rows` rows of a product, with room for the padding behind them.
at::Tensor fp8_product(int64_t rows, int64_t columns, Fp8Scaling scaling, const at::TensorOptions& options);
/// sum (+)= a b^T.
void fp8_accumulate(at::Tensor sum, const Fp8Matrix& a, const Fp8Matrix& b, bool accumulate);

/// Why `device` cannot compute in FP8 with this scaling; empty: it can.
std::string fp8_missing(c10::Device device, bool blocks);

}  // namespace mcore_bridge
