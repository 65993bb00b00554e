#include "layers/main_gradient.h"

#include <ATen/ATen.h>

#include <mutex>
#include <unordered_map>
#include <utility>

#include "kernels/cuda/graph.h"

namespace mcore_bridge {
namespace {

struct Registry {
  std::mutex mutex;
  std::unordered_map<const c10::TensorImpl*, std::shared_ptr<MainGradient>> gradients;
};

Registry& registry() {
  static Registry instance;
  return instance;
}

bool has_storage_to_itself(const at::Tensor& tensor) {
  return tensor.is_contiguous() && tensor.has_storage() && tensor.storage_offset() == 0 &&
         tensor.storage().nbytes() == tensor.nbytes();
}

}  // namespace

void set_main_gradient(const at::Tensor& parameter, std::shared_ptr<MainGradient> gradient) {
  auto& [mutex, gradients] = registry();
  const std::lock_guard<std::mutex> lock(mutex);
  gradients[parameter.unsafeGetTensorImpl()] = std::move(gradient);
}

void clear_main_gradient(const at::Tensor& parameter, const std::shared_ptr<MainGradient>& gradient) {
  auto& [mutex, gradients] = registry();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = gradients.find(parameter.unsafeGetTensorImpl());
  if (found != gradients.end() && found->second == gradient) gradients.erase(found);
}

std::shared_ptr<MainGradient> main_gradient(const at::Tensor& parameter) {
  if (!parameter.defined()) return nullptr;
  auto& [mutex, gradients] = registry();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = gradients.find(parameter.unsafeGetTensorImpl());
  return found == gradients.end() ? nullptr : found->second;
}

void contribute(MainGradient& main, std::function<void(const at::Tensor&, bool)> into) {
  cuda::run_beside([into = std::move(into), grad = main.grad, accumulate = !main.fresh] { into(grad, accumulate); });
  main.fresh = false;
  main.added = true;
}

void settle(const MainGradient& main, at::Tensor gradient, bool accumulate) {
  const auto& sum = main.grad;
  if (accumulate) {
    sum.add_(gradient);
    return;
  }
  const bool moves = !main.fixed && sum.scalar_type() == gradient.scalar_type() && sum.device() == gradient.device() &&
                     has_storage_to_itself(sum) && has_storage_to_itself(gradient) && gradient.use_count() == 1 &&
                     gradient.storage().use_count() == 1;
  if (!moves) {
    sum.copy_(gradient);
    return;
  }
  // Views of the main gradient see the new memory; the old goes back to its allocator.
  sum.storage().set_data_ptr_noswap(gradient.storage().set_data_ptr(c10::DataPtr(nullptr, sum.device())));
}

void accumulate_product(at::Tensor sum, const at::Tensor& a, const at::Tensor& b, bool accumulate, double scaling) {
  if (sum.scalar_type() == a.scalar_type()) {
    at::addmm_out(sum, sum, a.t(), b, accumulate ? 1 : 0, scaling);
  } else if (a.is_cuda()) {
    at::addmm_out(sum, sum, a.t(), b, sum.scalar_type(), accumulate ? 1 : 0, scaling);
  } else {
    at::addmm_out(sum, sum, a.t().to(sum.scalar_type()), b.to(sum.scalar_type()), accumulate ? 1 : 0, scaling);
  }
}

}  // namespace mcore_bridge
