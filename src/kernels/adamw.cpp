#include "kernels/adamw.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "kernels/device.h"

namespace mcore_bridge {
namespace {

void run_kernel(const AdamWTensors& t, const AdamWScalars& scalars, const at::Tensor& grad_scale,
                const at::Tensor& skip, const at::Tensor& step) {
  const c10::DeviceGuard guard(t.masters[0].device());
  cuda::AdamW p{.count = 0,
                .grad_scale = grad_scale.const_data_ptr<float>(),
                .skip = skip.const_data_ptr<float>(),
                .step = step.const_data_ptr<float>(),
                .lr = static_cast<float>(scalars.lr),
                .beta1 = static_cast<float>(scalars.beta1),
                .beta2 = static_cast<float>(scalars.beta2),
                .epsilon = static_cast<float>(scalars.epsilon),
                .weight_decay = static_cast<float>(scalars.weight_decay)};
  cuda::AdamWTypes types;  // of the launch
  auto launch = [&] {
    if (p.count > 0) cuda::adamw(p, types, current_stream(t.masters[0]));
    p.count = 0;
  };
  for (size_t i = 0; i < t.masters.size(); ++i) {
    if (t.masters[i].numel() == 0) continue;
    const cuda::AdamWTypes own{
        .master = kernel_type(t.masters[i]).value_or(cuda::Type::kFloat),
        .grad = *kernel_type(t.grads[i]),
        .exp_avg = *kernel_type(t.exp_avgs[i]),
        .exp_avg_sq = *kernel_type(t.exp_avg_sqs[i]),
        .parameter = t.parameters[i].defined() ? *kernel_type(t.parameters[i]) : cuda::Type::kFloat,
        .remainder = t.masters[i].scalar_type() == at::kShort};
    if (p.count == cuda::AdamW::kMaxTensors || own != types) launch();
    types = own;
    const auto at = p.count++;
    p.master[at] = mutable_pointer(t.masters[i]);
    p.grad[at] = pointer(t.grads[i]);
    p.exp_avg[at] = mutable_pointer(t.exp_avgs[i]);
    p.exp_avg_sq[at] = mutable_pointer(t.exp_avg_sqs[i]);
    p.parameter[at] = mutable_pointer(t.parameters[i]);
    p.elements[at] = t.masters[i].numel();
    if (at == 0) p.first_block[0] = 0;
    p.first_block[at + 1] =
        p.first_block[at] + static_cast<int>((p.elements[at] + cuda::kAdamWBlock - 1) / cuda::kAdamWBlock);
  }
  launch();
}

}  // namespace

bool fused_adamw_takes(const std::vector<at::Tensor>& entry) {
  const bool remainder = entry[0].scalar_type() == at::kShort;
  if (remainder && !kernel_type(entry[1])) return false;
  auto half = remainder ? at::kBFloat16 : at::kFloat;  // the one half precision among them
  return std::all_of(entry.begin(), entry.end(), [&](const at::Tensor& tensor) {
    if (tensor.scalar_type() == at::kFloat || (remainder && tensor.is_same(entry[0]))) return true;
    if (half == at::kFloat) half = tensor.scalar_type();
    return kernel_type(tensor) && tensor.scalar_type() == half;
  });
}

void fused_adamw(const AdamWTensors& t, const AdamWScalars& scalars, const at::Tensor& grad_scale,
                 const at::Tensor& skip, const at::Tensor& step) {
  if (t.masters.empty()) return;
  if (kernel_type(t.grads[0])) return run_kernel(t, scalars, grad_scale, skip, step);
  const std::vector<at::Tensor> steps(t.masters.size(), step);
  at::_fused_adamw_(t.masters, t.grads, t.exp_avgs, t.exp_avg_sqs, {}, steps, scalars.lr, scalars.beta1, scalars.beta2,
                    scalars.weight_decay, scalars.epsilon, /*amsgrad=*/false, /*maximize=*/false, grad_scale, skip);
  for (size_t i = 0; i < t.masters.size(); ++i) {
    if (t.parameters[i].defined()) t.parameters[i].view(t.masters[i].sizes()).copy_(t.masters[i]);
  }
}

}  // namespace mcore_bridge
