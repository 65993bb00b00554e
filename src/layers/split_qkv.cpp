#include "layers/split_qkv.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include "layers/given.h"

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct OptionsHolder : torch::CustomClassHolder {
  explicit OptionsHolder(SplitQkvOptions o) : options(std::move(o)) {}
  SplitQkvOptions options;  ///< its tensors are undefined: they are saved as variables
};

struct Split : torch::autograd::Function<Split> {
  static variable_list forward(AutogradContext* context, const at::Tensor& mixed,
                               const std::optional<at::Tensor>& q_weight, const std::optional<at::Tensor>& k_weight,
                               const SplitQkvOptions* options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const bool norm = q_weight.has_value();
    auto kept = *options;
    kept.cos = kept.sin = kept.q_weight = kept.k_weight = at::Tensor();
    context->saved_data["options"] = at::IValue::make_capsule(c10::make_intrusive<OptionsHolder>(std::move(kept)));
    context->save_for_backward({norm ? mixed : at::Tensor(), q_weight.value_or(at::Tensor()),
                                k_weight.value_or(at::Tensor()), options->cos, options->sin});
    // Only the norms' backward reads the fused row; without them it is freed, so v must not be a view into it.
    auto [q, k, v] = split_qkv_forward(mixed, *options, /*view_v=*/norm);
    return {q, k, v};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto capsule = context->saved_data["options"].toCapsule();
    auto options = static_cast<const OptionsHolder*>(capsule.get())->options;
    const auto saved = context->get_saved_variables();
    options.q_weight = saved[1];
    options.k_weight = saved[2];
    options.cos = saved[3];
    options.sin = saved[4];
    const bool norm = saved[1].defined();
    const bool wants_weights = norm && (context->needs_input_grad(1) || context->needs_input_grad(2));
    const auto back = split_qkv_backward({grads[0], grads[1], grads[2]}, saved[0], options, wants_weights);
    return {back.mixed, back.q_weight, back.k_weight, Variable()};
  }
};

}  // namespace

Qkv split_qkv(const at::Tensor& mixed, const SplitQkvOptions& options) {
  const auto out = Split::apply(mixed, given(options.q_weight), given(options.k_weight), &options);
  return {out[0], out[1], out[2]};
}

}  // namespace mcore_bridge
