// LoRA's B of a fused layer as one matrix, so that all parts are one product with the stacked A.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace mcore_bridge {

/// Widths of the fused parts (q, k, v / gate, up) inside one block of the local output, and how many such blocks there
/// are: one block per key/value head for QKV, a single block otherwise.
struct PartLayout {
  int64_t blocks = 1;
  std::vector<int64_t> widths;
  int64_t rows() const;
};

/// `b` [rows of the adapted parts, r] -> [all rows, adapted parts * r], times `scaling`, with zeros where a part does
/// not see another's A. Also into `inside` [all rows, adapted parts * r], whose rows need not follow each other, when
/// that is defined.
at::Tensor expand_b(const at::Tensor& b, const std::vector<bool>& parts, const PartLayout& layout, double scaling,
                    const at::Tensor& inside = {});

/// The gradient's way back: `to` [rows of the adapted parts, r] (+)= scaling * its entries of `expanded`; the rest of
/// expanded is of no meaning. `to` may be wider than expanded.
void collect_b(const at::Tensor& expanded, at::Tensor to, const std::vector<bool>& parts, const PartLayout& layout,
               double scaling, bool accumulate);

/// Rows of the adapted parts.
int64_t adapted_rows(const std::vector<bool>& parts, const PartLayout& layout);

}  // namespace mcore_bridge
