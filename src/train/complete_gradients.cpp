#include "train/complete_gradients.h"

#include <ATen/ATen.h>

#include <map>

namespace mcore_bridge {
namespace {

using Parameters = std::vector<TrainableParameter>;

/// All-reduces several tensors as one.
void reduce_as_one(std::vector<at::Tensor> tensors, const Group& group) {
  if (tensors.empty() || group.size() == 1) return;
  std::vector<at::Tensor> flat;
  for (const auto& tensor : tensors) flat.push_back(tensor.flatten());
  auto all = at::cat(flat);
  group.all_reduce(all);
  int64_t at = 0;
  for (auto& tensor : tensors) {
    tensor.copy_(all.narrow(0, at, tensor.numel()).view_as(tensor));
    at += tensor.numel();
  }
}

at::Tensor shared_part(const TrainableParameter& parameter) {
  return parameter.main_grad.narrow(0, parameter.traits.shared_first_row, parameter.traits.shared_rows);
}

void reduce_partial_over_tp(const Parameters& parameters, const ParallelState& parallel) {
  std::vector<at::Tensor> partial;
  for (const auto& parameter : parameters) {
    if (parameter.traits.sum_over_tp) partial.push_back(parameter.main_grad);
  }
  reduce_as_one(std::move(partial), parallel.tp);
}

void reduce_shared_rows(const Parameters& parameters, const ParallelState& parallel) {
  // One slot per group of neighbours that hold the same rows: the sum over all tensor ranks adds only within a slot.
  const auto& tp = parallel.tp;
  std::map<int, std::vector<at::Tensor>> by_copies;
  for (const auto& parameter : parameters) {
    if (parameter.traits.shared_rows > 0) by_copies[parameter.traits.shared_copies].push_back(shared_part(parameter));
  }
  for (auto& [copies, parts] : by_copies) {
    std::vector<at::Tensor> flat;
    for (const auto& part : parts) flat.push_back(part.flatten());
    const auto mine = at::cat(flat);
    auto slots = at::zeros({tp.size() / copies, mine.numel()}, mine.options());
    const auto slot = slots[tp.rank() / copies];
    slot.copy_(mine);
    tp.all_reduce(slots);
    int64_t at = 0;
    for (auto& part : parts) {
      part.copy_(slot.narrow(0, at, part.numel()).view_as(part));
      at += part.numel();
    }
  }
}

void reduce_tied_embedding(const Parameters& parameters, const ParallelState& parallel) {
  std::vector<at::Tensor> tied;
  for (const auto& parameter : parameters) {
    if (parameter.traits.tied_embedding) tied.push_back(parameter.main_grad);
  }
  reduce_as_one(std::move(tied), parallel.embedding);
}

}  // namespace

void complete_gradients(const Parameters& parameters, const ParallelState& parallel) {
  at::NoGradGuard no_grad;
  reduce_partial_over_tp(parameters, parallel);
  reduce_shared_rows(parameters, parallel);
  reduce_tied_embedding(parameters, parallel);
}

}  // namespace mcore_bridge
