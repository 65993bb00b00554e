#include "layers/recompute.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <mutex>

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using Block = std::function<at::Tensor(const at::Tensor&)>;

/// The default generators that ops on a tensor of this device draw from.
std::vector<at::Generator> generators(c10::Device device) {
  std::vector<at::Generator> result{at::detail::getDefaultCPUGenerator()};
  if (!device.is_cpu() && !device.is_meta()) result.push_back(at::globalContext().defaultGenerator(device));
  return result;
}

std::vector<at::Tensor> random_state(c10::Device device) {
  std::vector<at::Tensor> states;
  for (auto& generator : generators(device)) {
    const std::lock_guard<std::mutex> lock(generator.mutex());
    states.push_back(generator.get_state());
  }
  return states;
}

void set_random_state(c10::Device device, const std::vector<at::Tensor>& states) {
  auto all = generators(device);
  for (size_t i = 0; i < all.size(); ++i) {
    const std::lock_guard<std::mutex> lock(all[i].mutex());
    all[i].set_state(states[i]);
  }
}

/// What backward needs: the block and the random state it started from.
struct Recipe : torch::CustomClassHolder {
  Block block;
  std::vector<at::Tensor> state;
};

struct Recompute : torch::autograd::Function<Recompute> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const Block* block) {
    auto recipe = c10::make_intrusive<Recipe>();
    recipe->block = *block;
    recipe->state = random_state(x.device());
    context->saved_data["recipe"] = at::IValue::make_capsule(recipe);
    context->save_for_backward({x});
    return (*block)(x);  // autograd is off inside a Function's forward
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto capsule = context->saved_data["recipe"].toCapsule();
    const auto& recipe = *static_cast<const Recipe*>(capsule.get());
    const auto x = context->get_saved_variables()[0].detach().requires_grad_(true);
    const auto now = random_state(x.device());
    set_random_state(x.device(), recipe.state);
    at::Tensor y;
    {
      at::AutoGradMode grad_mode(true);
      y = recipe.block(x);
    }
    set_random_state(x.device(), now);
    torch::autograd::backward({y}, {grads[0]});
    return {x.grad(), Variable()};
  }
};

}  // namespace

at::Tensor recompute(Block f, const at::Tensor& x) { return Recompute::apply(x, &f); }

}  // namespace mcore_bridge
