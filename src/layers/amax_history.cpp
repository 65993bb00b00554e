#include "layers/amax_history.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace mcore_bridge {

AmaxHistory::AmaxHistory(int64_t slots, int64_t length, bool most_recent, c10::Device device)
    : most_recent_(most_recent) {
  const auto options = at::TensorOptions(device).dtype(at::kFloat);
  values_ = at::zeros({slots, length}, options);
  reference_ = at::zeros({slots}, options);
  next_ = at::zeros({slots}, options);
}

void AmaxHistory::raise(const at::Tensor& slots, const at::Tensor& magnitudes) {
  next_.index_copy_(0, slots, at::maximum(next_.index_select(0, slots), magnitudes));
}

void AmaxHistory::update(const std::vector<Group>& groups) {
  const at::NoGradGuard no_grad;
  auto newest = next_.nan_to_num(0, 0, 0);
  for (const auto& group : groups) group.all_reduce_max(newest);
  const auto last = values_.select(1, 0);
  newest = at::where(newest > 0, newest, last).unsqueeze(1);
  values_.copy_(values_.size(1) == 1 ? newest : at::cat({newest, values_.narrow(1, 0, values_.size(1) - 1)}, 1));
  next_.zero_();
  known_ = true;
  refer();
}

void AmaxHistory::restore(const at::Tensor& values) {
  const at::NoGradGuard no_grad;
  TORCH_INTERNAL_ASSERT(values.size(0) == slots());
  const auto length = std::min(values.size(1), values_.size(1));
  values_.zero_();
  values_.narrow(1, 0, length).copy_(values.narrow(1, 0, length));
  next_.zero_();
  known_ = values.ne(0).any().item<bool>();
  refer();
}

void AmaxHistory::refer() { reference_.copy_(most_recent_ ? values_.select(1, 0) : values_.amax(1)); }

}  // namespace mcore_bridge
