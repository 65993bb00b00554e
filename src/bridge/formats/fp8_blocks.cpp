#include "bridge/formats/fp8_blocks.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "bridge/formats/fp8.h"
#include "bridge/formats/quantization.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

constexpr BlockSize kBlock;
constexpr double kLargest = 448;              // of float8_e4m3fn
constexpr int64_t kPieceElements = 16 << 20;  // a weight is quantised so many values at a time: 64 MiB of float

/// [block rows, 128, block columns, 128] of a matrix in float, zeros behind its edges.
at::Tensor in_blocks(const at::Tensor& matrix) {
  const auto rows = blocks_of(matrix.size(0), kBlock.rows), columns = blocks_of(matrix.size(1), kBlock.cols);
  return at::constant_pad_nd(matrix.to(at::kFloat),
                             {0, columns * kBlock.cols - matrix.size(1), 0, rows * kBlock.rows - matrix.size(0)})
      .view({rows, kBlock.rows, columns, kBlock.cols});
}

at::Tensor of_blocks(const at::Tensor& numbers) { return numbers.unsqueeze(1).unsqueeze(3); }

at::Tensor codes_of(const at::Tensor& blocks, const at::Tensor& factor) {
  return (blocks * of_blocks(factor)).clamp_(-kLargest, kLargest).to(at::kFloat8_e4m3fn);
}

/// Not 0 for blocks whose values are not what `known` scales make of their codes.
at::Tensor changed_blocks(const at::Tensor& blocks, const at::Tensor& known, c10::ScalarType dtype) {
  const auto codes = codes_of(blocks, known.reciprocal().nan_to_num_(0, 0, 0));
  const auto again = (codes.to(at::kFloat) * of_blocks(known)).to(dtype).to(at::kFloat);
  return again.ne(blocks).to(at::kFloat).amax({1, 3});
}

}  // namespace

Fp8Blocks fp8_blocks(const at::Tensor& amax, const at::Tensor& known, const at::Tensor& changed,
                     c10::ScalarType dtype) {
  const auto one = at::ones_like(amax), zero = at::zeros_like(amax);
  // As fp8_factor() and fp8_scale(): quotients, not products with a reciprocal.
  auto factor = at::where(amax > 0, at::full_like(amax, kLargest).div(amax), one);
  factor = at::where(factor.isfinite(), factor, zero);
  auto scale = at::where(factor > 0, factor.reciprocal(), one);
  if (dtype != c10::ScalarType::Float) {  // values must go with the scale that is read again
    scale = scale.to(dtype).to(at::kFloat);
    factor = at::where(factor.gt(0).logical_and(scale > 0), scale.reciprocal(), factor);
  }
  const auto finite = amax.isfinite(), inverse = known.reciprocal();
  const auto kept = (known > 0).logical_and(inverse.isfinite()).logical_and(changed == 0);
  scale = at::where(kept, known, scale);
  factor = at::where(kept, inverse, factor);
  return {at::where(finite, scale, amax), at::where(finite, factor, zero)};
}

bool is_fp8_weight(const HfTensor& tensor) {
  return is_quantized_weight(QuantMethod::kFp8, tensor.name, tensor.sizes());
}

Fp8WholeWeights::Fp8WholeWeights(const std::vector<HfTensor>& tensors, const Fp8ScalesByName& known,
                                 const Group& group) {
  // A scale is the same on every rank that has read it.
  std::vector<at::Tensor> grids;
  for (const auto& tensor : tensors) {
    if (!is_fp8_weight(tensor)) continue;
    const auto found = known.find(tensor.name);
    if (found == known.end()) continue;
    const auto rows = blocks_of(tensor.rows, kBlock.rows), columns = blocks_of(tensor.cols, kBlock.cols);
    grids.push_back(found->second.grid.defined() ? found->second.grid.to(at::kFloat).reshape({rows * columns})
                                                 : at::zeros({rows * columns}, at::kFloat));
    known_[tensor.name] = {at::Tensor(), found->second.dtype};
  }
  if (grids.empty()) return;
  auto all = at::cat(grids);
  group.all_reduce_max(all);
  int64_t at = 0;
  for (const auto& tensor : tensors) {
    const auto found = known_.find(tensor.name);
    if (found == known_.end()) continue;
    const auto rows = blocks_of(tensor.rows, kBlock.rows), columns = blocks_of(tensor.cols, kBlock.cols);
    found->second.grid = all.narrow(0, at, rows * columns).view({rows, columns});
    at += rows * columns;
  }
}

Fp8Weight Fp8WholeWeights::quantize(const std::string& name, const at::Tensor& weight) const {
  const auto rows = weight.size(0), columns = weight.size(1);
  const auto found = known_.find(name);
  const auto dtype = found == known_.end() ? c10::ScalarType::Float : fp8_scale_dtype(found->second.dtype);
  Fp8Weight result{at::empty({rows, columns}, weight.options().dtype(at::kFloat8_e4m3fn)), {}};
  std::vector<at::Tensor> scales;
  const auto piece = std::max<int64_t>(1, kPieceElements / std::max<int64_t>(1, columns) / kBlock.rows) * kBlock.rows;
  for (int64_t first = 0; first < rows; first += piece) {
    const auto count = std::min(piece, rows - first);
    const auto blocks = in_blocks(weight.narrow(0, first, count));
    const auto amax = blocks.abs().amax({1, 3});
    auto known = at::zeros_like(amax), changed = known;
    if (found != known_.end()) {
      known = found->second.grid.narrow(0, first / kBlock.rows, amax.size(0)).to(weight.device());
      changed = changed_blocks(blocks, known, weight.scalar_type());
    }
    const auto [scale, factor] = fp8_blocks(amax, known, changed, dtype);
    const auto codes = codes_of(blocks, factor).view({amax.size(0) * kBlock.rows, amax.size(1) * kBlock.cols});
    result.codes.narrow(0, first, count).copy_(codes.narrow(0, 0, count).narrow(1, 0, columns));
    scales.push_back(scale);
  }
  const auto all = at::cat(scales);
  if (!all.isfinite().all().item<bool>())
    fail<NonFiniteError>("export_weights: '", name, "' holds NaN or Inf and cannot be quantised as fp8");
  result.scale = all.to(dtype);
  return result;
}

}  // namespace mcore_bridge
