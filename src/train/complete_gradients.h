// Gradients that are partial on each model-parallel rank, made whole; and their norm.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "layers/module.h"
#include "parallel/parallel_state.h"

namespace mcore_bridge {

/// Elements [begin, end) of a parameter's gradient, row-major.
struct GradientPiece {
  at::Tensor values;  ///< 1-D
  int64_t begin = 0, end = 0;
  int64_t row = 1;  ///< elements per row of the parameter
  ParameterTraits traits;
};

/// Elements in a row of a parameter.
int64_t row_elements(const at::Tensor& parameter);

/// Sums over tensor ranks what each of them knows a part of, and over the two stages that share an embedding. In place.
/// Collective over the model-parallel ranks, which must give the same pieces of the same parameters; the data-parallel
/// sum is the caller's.
void complete_gradients(const std::vector<GradientPiece>& pieces, const ParallelState& parallel);

/// Sum of squares of completed gradients, such that adding it up over the model-parallel ranks counts every element of
/// the model once. double scalar.
at::Tensor sum_of_squares(const std::vector<GradientPiece>& pieces, const ParallelState& parallel, c10::Device device);

}  // namespace mcore_bridge
