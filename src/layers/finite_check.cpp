#include "layers/finite_check.h"

#include <ATen/ATen.h>

namespace mcore_bridge {
namespace {

thread_local FiniteCheck* current = nullptr;

}  // namespace

FiniteCheck::FiniteCheck() { current = this; }
FiniteCheck::~FiniteCheck() { current = nullptr; }

void check_finite(const at::Tensor& output, const char* prefix, int64_t number) {
  if (current == nullptr || !current->first_.empty()) return;
  if (output.isfinite().all().item<bool>()) return;
  current->first_ = prefix + (number < 0 ? std::string() : std::to_string(number));
}

}  // namespace mcore_bridge
