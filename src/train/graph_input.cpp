#include "train/graph_input.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <utility>
#include <vector>

namespace mcore_bridge {
namespace {

constexpr int64_t kAlignment = 256;  // bytes, as the allocator's own

/// Cuts `bytes` into tensors like those given, one after another.
class Views {
 public:
  explicit Views(at::Tensor bytes) : bytes_(std::move(bytes)) {}

  at::Tensor next(const at::Tensor& like) {
    const auto size = static_cast<int64_t>(like.nbytes());
    const auto view = bytes_.narrow(0, offset_, size).view(like.scalar_type()).view(like.sizes());
    offset_ += aligned(size);
    return view;
  }

  static int64_t aligned(int64_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

 private:
  at::Tensor bytes_;
  int64_t offset_ = 0;
};

}  // namespace

GraphInput::GraphInput(const ForwardInput& like, c10::Device device) : batch_(like) {
  int64_t size = 0;
  for_tensors(like, [&](const at::Tensor& tensor) {
    if (tensor.defined()) size += Views::aligned(static_cast<int64_t>(tensor.nbytes()));
  });
  buffer_ = at::empty({size}, at::TensorOptions(device).dtype(at::kByte));
  Views views(buffer_);
  for_tensors(batch_, [&](at::Tensor& tensor) {
    if (tensor.defined()) tensor = views.next(tensor);
  });
}

void GraphInput::fill(const ForwardInput& from) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> given;
  for_tensors(from, [&](const at::Tensor& tensor) { given.push_back(tensor); });
  const auto staged = at::empty(buffer_.sizes(), at::TensorOptions(at::kByte).pinned_memory(buffer_.is_cuda()));
  Views views(staged);
  std::vector<std::pair<at::Tensor, at::Tensor>> elsewhere;  // what is on a device already
  size_t i = 0;
  for_tensors(batch_, [&](const at::Tensor& tensor) {
    const auto& source = given.at(i++);
    TORCH_INTERNAL_ASSERT(source.defined() == tensor.defined());
    if (!tensor.defined()) return;
    TORCH_INTERNAL_ASSERT(source.sizes() == tensor.sizes());
    auto view = views.next(tensor);
    if (source.is_cpu()) {
      view.copy_(source);
    } else {
      elsewhere.emplace_back(tensor, source);
    }
  });
  buffer_.copy_(staged, /*non_blocking=*/true);
  for (const auto& [tensor, source] : elsewhere) tensor.copy_(source, /*non_blocking=*/true);
}

}  // namespace mcore_bridge
