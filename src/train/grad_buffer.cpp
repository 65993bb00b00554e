#include "train/grad_buffer.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <map>

#include "mcore_bridge/error.h"

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
  reduce_partial_over_tp();
  reduce_shared_rows();
  reduce_tied_embedding();
  for (auto& bucket : buckets_) parallel_->dp_cp.all_reduce(bucket);
}

void GradBuffer::reduce_partial_over_tp() {
  std::vector<at::Tensor> partial;
  for (const auto& parameter : parameters_) {
    if (parameter.traits.sum_over_tp) partial.push_back(parameter.main_grad);
  }
  reduce_as_one(std::move(partial), parallel_->tp);
}

void GradBuffer::reduce_shared_rows() {
  // One slot per group of neighbours that hold the same rows: the sum over all tensor ranks adds only within a slot.
  const auto& tp = parallel_->tp;
  std::map<int, std::vector<at::Tensor>> by_copies;
  for (const auto& parameter : parameters_) {
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

void GradBuffer::reduce_tied_embedding() {
  std::vector<at::Tensor> tied;
  for (const auto& parameter : parameters_) {
    if (parameter.traits.tied_embedding) tied.push_back(parameter.main_grad);
  }
  reduce_as_one(std::move(tied), parallel_->embedding);
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
