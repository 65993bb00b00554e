#include "train/graph_shape.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>

#include "train/graph_input.h"

namespace mcore_bridge {
namespace {

constexpr int64_t kIgnore = -100;

int64_t power_of_two(int64_t n) { return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n))); }

/// [1, tokens], filled by starting over.
at::Tensor repeated(const at::Tensor& row, int64_t tokens) {
  const auto have = row.size(1);
  return have == tokens ? row : row.repeat({1, (tokens + have - 1) / have}).narrow(1, 0, tokens);
}

}  // namespace

GraphShape graph_shape(int64_t tokens, int64_t documents, int64_t longest) {
  const auto below = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(1, tokens))));
  const auto step = std::max<int64_t>(8, below / 8);
  const auto padded = (tokens + step - 1) / step * step;
  return {
      .tokens = padded,
      .documents = std::max<int64_t>(8, power_of_two(documents)),
      .longest = std::min(std::max<int64_t>(128, power_of_two(padded)), std::max<int64_t>(512, power_of_two(longest)))};
}

ForwardInput in_graph_shape(const ForwardInput& batch) {
  auto ends = batch.packed->cu_seqlens_host;
  const auto documents = ends.size() - 1;
  const auto given = ends.back(), tokens = graph_shape(given, 1, 1).tokens;
  for (size_t i = 0; ends.back() < tokens; i = (i + 1) % documents)
    ends.push_back(std::min(tokens, ends.back() + ends[i + 1] - ends[i]));
  const auto shape = graph_shape(given, static_cast<int64_t>(ends.size()) - 1, batch.packed->max_seqlen);
  ends.resize(static_cast<size_t>(shape.documents) + 1, ends.back());

  auto result = batch;
  for (auto member : {&ForwardInput::input_ids, &ForwardInput::position_ids}) {
    if ((batch.*member).defined()) result.*member = repeated(batch.*member, tokens);
  }
  if (batch.labels.defined()) result.labels = at::constant_pad_nd(batch.labels, {0, tokens - given}, kIgnore);
  result.packed = PackedSeqParams{.cu_seqlens = at::tensor(ends, at::kLong).to(at::kInt), .max_seqlen = shape.longest};
  return result;
}

std::vector<int64_t> shape_key(const ForwardInput& batch) {
  std::vector<int64_t> key;
  for_tensors(batch, [&](const at::Tensor& tensor) {
    key.push_back(tensor.defined() ? tensor.dim() : -1);
    if (tensor.defined()) key.insert(key.end(), tensor.sizes().begin(), tensor.sizes().end());
  });
  if (batch.packed) {
    key.push_back(batch.packed->max_seqlen);
    const auto& ends = batch.packed->cu_seqlens_host;
    key.insert(key.end(), ends.begin(), ends.end());
  }
  return key;
}

}  // namespace mcore_bridge
