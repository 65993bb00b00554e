#include "train/grad_buffer.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include "mcore_bridge/error.h"
#include "train/complete_gradients.h"

namespace mcore_bridge {
namespace {

/// Adds a low-precision gradient to the fp32 one as soon as backward has it, and drops it.
class AccumulateInFp32 : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit AccumulateInFp32(at::Tensor main_grad) : main_grad_(std::move(main_grad)) {}
  void operator()(const torch::autograd::Variable& parameter) override {
    at::NoGradGuard no_grad;
    main_grad_.add_(parameter.grad());
    parameter.mutable_grad().reset();
  }

 private:
  at::Tensor main_grad_;
};

}  // namespace

GradBuffer::GradBuffer(const std::vector<NamedParameter>& parameters, ParallelStatePtr parallel,
                       int64_t bucket_elements)
    : parallel_(std::move(parallel)) {
  for (const auto& parameter : parameters) {
    if (parameter.tensor.requires_grad())
      parameters_.push_back({parameter.name, parameter.tensor, {}, parameter.traits});
  }
  MCB_CHECK(!parameters_.empty() || parallel_->topology.sizes().pipeline > 1,
            "Trainer: no parameter requires gradients");
  std::vector<TrainableParameter*> pending;
  int64_t elements = 0;
  auto close = [&] {
    if (pending.empty()) return;
    auto bucket = at::zeros({elements}, pending.front()->tensor.options().dtype(at::kFloat).requires_grad(false));
    int64_t at = 0;
    for (auto* parameter : pending) {
      parameter->main_grad = bucket.narrow(0, at, parameter->tensor.numel()).view(parameter->tensor.sizes());
      at += parameter->tensor.numel();
    }
    buckets_.push_back(std::move(bucket));
    pending.clear();
    elements = 0;
  };
  for (auto parameter = parameters_.rbegin(); parameter != parameters_.rend(); ++parameter) {
    if (elements + parameter->tensor.numel() > bucket_elements) close();
    pending.push_back(&*parameter);
    elements += parameter->tensor.numel();
  }
  close();
  for (auto& parameter : parameters_) {
    if (parameter.tensor.scalar_type() == at::kFloat) continue;
    torch::autograd::impl::set_post_acc_grad_hooks(parameter.tensor,
                                                   std::make_unique<AccumulateInFp32>(parameter.main_grad));
  }
}

GradBuffer::~GradBuffer() {
  for (auto& parameter : parameters_) {
    if (parameter.tensor.scalar_type() == at::kFloat) {
      parameter.tensor.mutable_grad().reset();
    } else {
      torch::autograd::impl::set_post_acc_grad_hooks(parameter.tensor, nullptr);
    }
  }
}

void GradBuffer::begin() {
  for (auto& bucket : buckets_) bucket.zero_();
  for (auto& parameter : parameters_) {
    auto& grad = parameter.tensor.mutable_grad();
    if (parameter.tensor.scalar_type() == at::kFloat) {
      if (!grad.is_same(parameter.main_grad)) grad = parameter.main_grad;  // autograd adds in place
    } else {
      grad.reset();
    }
  }
}

void GradBuffer::reduce() {
  at::NoGradGuard no_grad;
  complete_gradients(parameters_, *parallel_);
  for (auto& bucket : buckets_) parallel_->dp_cp.all_reduce(bucket);
}

at::Tensor GradBuffer::sum_of_squares() const {
  at::NoGradGuard no_grad;
  std::vector<at::Tensor> counted;
  for (const auto& parameter : parameters_) {
    const auto& traits = parameter.traits;
    if (!traits.tp_split && parallel_->tp.rank() != 0) continue;
    if (traits.tied_embedding && !parallel_->is_first_stage()) continue;
    if (traits.shared_rows > 0 && parallel_->tp.rank() % traits.shared_copies != 0) {
      const auto after = traits.shared_first_row + traits.shared_rows;
      counted.push_back(parameter.main_grad.narrow(0, 0, traits.shared_first_row));
      counted.push_back(parameter.main_grad.narrow(0, after, parameter.main_grad.size(0) - after));
    } else {
      counted.push_back(parameter.main_grad);
    }
  }
  const auto device = buckets_.empty() ? c10::Device(c10::kCPU) : buckets_[0].device();
  if (counted.empty()) return at::zeros({}, at::TensorOptions(device).dtype(at::kDouble));
  const auto norms = at::_foreach_norm(counted);
  return at::stack(norms).to(at::kDouble).square().sum();
}

}  // namespace mcore_bridge
