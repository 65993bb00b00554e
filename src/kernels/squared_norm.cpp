#include "kernels/squared_norm.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "kernels/device.h"

namespace mcore_bridge {
namespace {

int blocks_of(const at::Tensor& tensor) {
  return static_cast<int>((tensor.numel() + cuda::kSquaresBlock - 1) / cuda::kSquaresBlock);
}

at::Tensor run_kernel(const std::vector<at::Tensor>& tensors) {
  const c10::DeviceGuard guard(tensors[0].device());
  int64_t blocks = 0;
  for (const auto& tensor : tensors) blocks += blocks_of(tensor);
  auto partials = at::empty({blocks}, tensors[0].options().dtype(at::kFloat));
  cuda::Squares p{.count = 0, .first_block = {0}, .partials = partials.mutable_data_ptr<float>()};
  auto type = cuda::Type::kFloat;  // of the launch
  auto launch = [&] {
    if (p.count == 0) return;
    cuda::sum_of_squares(p, type, current_stream(tensors[0]));
    p.partials += p.first_block[p.count];
    p.count = 0;
  };
  for (const auto& tensor : tensors) {
    if (tensor.numel() == 0) continue;
    const auto own = *kernel_type(tensor);
    if (p.count == cuda::Squares::kMaxTensors || own != type) launch();
    type = own;
    const auto at = p.count++;
    p.x[at] = pointer(tensor);
    p.elements[at] = tensor.numel();
    p.first_block[at + 1] = p.first_block[at] + blocks_of(tensor);
  }
  launch();
  return partials.sum(at::kDouble);
}

}  // namespace

at::Tensor squared_norm(const std::vector<at::Tensor>& tensors) {
  if (std::all_of(tensors.begin(), tensors.end(),
                  [](const at::Tensor& tensor) { return kernel_type(tensor) && tensor.is_contiguous(); }))
    return run_kernel(tensors);
  return at::stack(at::_foreach_norm(tensors, 2, at::kFloat)).to(at::kDouble).square().sum();
}

}  // namespace mcore_bridge
