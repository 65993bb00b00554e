// The nearest (semi-)orthogonal matrix, roughly, by matrix products alone.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "parallel/group.h"

namespace mcore_bridge {

struct NewtonSchulzOptions {
  int64_t steps = 5;
  std::string coefficients = "quintic";  ///< simple | quintic | polar_express
  std::string precision = "medium";      ///< of the products: medium (bf16) | high (TF32) | highest (fp32)
};

/// How a matrix is spread over ranks: each holds some of its rows (dim 0) or columns (dim 1), and `copies` neighbours
/// hold the same ones.
struct MatrixSplit {
  const Group* group = nullptr;  ///< null: it is whole
  int64_t dim = 0;
  int copies = 1;
};

/// Moves the singular values of `matrix` (fp32) towards 1: X <- a X + b (X X^T) X + c (X X^T)^2 X with coefficients
/// that change from step to step. The result lies about as the matrix did; fp32. Collective over the split's group.
at::Tensor newton_schulz(const at::Tensor& matrix, const NewtonSchulzOptions& options, const MatrixSplit& split = {});

}  // namespace mcore_bridge
