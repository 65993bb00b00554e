#include "train/complete_gradients.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <map>

#include "kernels/squared_norm.h"

namespace mcore_bridge {
namespace {

using Pieces = std::vector<GradientPiece>;

/// All-reduces several tensors as one.
void reduce_as_one(const std::vector<at::Tensor>& tensors, const Group& group) {
  if (tensors.empty() || group.size() == 1) return;
  auto all = at::cat(tensors);
  group.all_reduce(all);
  int64_t at = 0;
  for (const auto& tensor : tensors) {
    tensor.copy_(all.narrow(0, at, tensor.numel()));
    at += tensor.numel();
  }
}

/// Where the rows that several tensor ranks hold lie inside the piece: [first, second) of its values.
std::pair<int64_t, int64_t> shared_range(const GradientPiece& piece) {
  const auto first = piece.traits.shared_first_row * piece.row, last = first + piece.traits.shared_rows * piece.row;
  const auto from = std::clamp(first, piece.begin, piece.end), to = std::clamp(last, piece.begin, piece.end);
  return {from - piece.begin, to - piece.begin};
}

const Group& tensor_group(const ParameterTraits& traits, const ParallelState& parallel) {
  return traits.expert ? parallel.etp : parallel.tp;
}

void reduce_partial_over_tp(const Pieces& pieces, const ParallelState& parallel) {
  std::vector<at::Tensor> dense, expert;
  for (const auto& piece : pieces) {
    if (piece.traits.sum_over_tp) (piece.traits.expert ? expert : dense).push_back(piece.values);
  }
  reduce_as_one(dense, parallel.tp);
  reduce_as_one(expert, parallel.etp);
}

void reduce_shared_rows(const Pieces& pieces, const ParallelState& parallel) {
  // One slot per group of neighbours that hold the same rows: the sum over all tensor ranks adds only within a slot.
  const auto& tp = parallel.tp;
  std::map<int, std::vector<at::Tensor>> by_copies;
  for (const auto& piece : pieces) {
    const auto [first, last] = shared_range(piece);
    if (first < last) by_copies[piece.traits.shared_copies].push_back(piece.values.narrow(0, first, last - first));
  }
  for (const auto& [copies, parts] : by_copies) {
    const auto mine = at::cat(parts);
    auto slots = at::zeros({tp.size() / copies, mine.numel()}, mine.options());
    const auto slot = slots[tp.rank() / copies];
    slot.copy_(mine);
    tp.all_reduce(slots);
    int64_t at = 0;
    for (const auto& part : parts) {
      part.copy_(slot.narrow(0, at, part.numel()));
      at += part.numel();
    }
  }
}

void reduce_tied_embedding(const Pieces& pieces, const ParallelState& parallel) {
  std::vector<at::Tensor> tied;
  for (const auto& piece : pieces) {
    if (piece.traits.tied_embedding) tied.push_back(piece.values);
  }
  reduce_as_one(tied, parallel.embedding);
}

}  // namespace

int64_t row_elements(const at::Tensor& parameter) {
  return parameter.dim() > 1 ? parameter.numel() / std::max<int64_t>(1, parameter.size(0)) : 1;
}

void complete_gradients(const Pieces& pieces, const ParallelState& parallel) {
  at::NoGradGuard no_grad;
  reduce_partial_over_tp(pieces, parallel);
  reduce_shared_rows(pieces, parallel);
  reduce_tied_embedding(pieces, parallel);
}

at::Tensor sum_of_squares(const Pieces& pieces, const ParallelState& parallel, c10::Device device) {
  at::NoGradGuard no_grad;
  std::vector<at::Tensor> counted;
  for (const auto& piece : pieces) {
    const auto& traits = piece.traits;
    const auto& tp = tensor_group(traits, parallel);
    if (!traits.tp_split && tp.rank() != 0) continue;
    if (traits.tied_embedding && !parallel.is_first_stage()) continue;
    const auto [first, last] = shared_range(piece);
    if (first < last && tp.rank() % traits.shared_copies != 0) {
      if (first > 0) counted.push_back(piece.values.narrow(0, 0, first));
      if (last < piece.values.numel()) counted.push_back(piece.values.narrow(0, last, piece.values.numel() - last));
    } else {
      counted.push_back(piece.values);
    }
  }
  if (counted.empty()) return at::zeros({}, at::TensorOptions(device).dtype(at::kDouble));
  return squared_norm(counted);
}

}  // namespace mcore_bridge
