#include "layers/recompute.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

#include "parallel/random.h"

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using Block = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;

thread_local bool second_run = false;

/// Which run of a block this is, until it is over.
class Run {
 public:
  explicit Run(bool second) : before_(std::exchange(second_run, second)) {}
  ~Run() { second_run = before_; }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

 private:
  bool before_;
};

/// What backward needs: the block and the random state it started from.
struct Recipe : torch::CustomClassHolder {
  Block block;
  c10::Device device{c10::kCPU};
  std::vector<at::Tensor> state;
};

struct Recompute : torch::autograd::Function<Recompute> {
  static variable_list forward(AutogradContext* context, at::TensorList inputs, const Block* block) {
    const variable_list x(inputs.begin(), inputs.end());
    auto recipe = c10::make_intrusive<Recipe>();
    recipe->block = *block;
    recipe->device = x[0].device();
    recipe->state = random_state(recipe->device);
    context->saved_data["recipe"] = at::IValue::make_capsule(recipe);
    context->save_for_backward(x);
    context->set_materialize_grads(false);
    const Run first(false);
    return (*block)(x);  // autograd is off inside a Function's forward
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto capsule = context->saved_data["recipe"].toCapsule();
    const auto& recipe = *static_cast<const Recipe*>(capsule.get());
    variable_list x;
    for (const auto& saved : context->get_saved_variables())
      x.push_back(saved.defined() ? saved.detach().requires_grad_(saved.requires_grad()) : saved);
    const auto now = random_state(recipe.device);
    set_random_state(recipe.device, recipe.state);
    variable_list y;
    {
      const at::AutoGradMode grad_mode(true);
      const Run second(true);
      y = recipe.block(x);
    }
    set_random_state(recipe.device, now);
    variable_list roots, root_grads;
    for (size_t i = 0; i < y.size(); ++i) {
      if (!grads[i].defined() || !y[i].requires_grad()) continue;
      roots.push_back(y[i]);
      root_grads.push_back(grads[i]);
    }
    if (!roots.empty()) torch::autograd::backward(roots, root_grads);
    variable_list result;
    for (const auto& input : x) result.push_back(input.defined() && input.requires_grad() ? input.grad() : Variable());
    result.emplace_back();  // of the block
    return result;
  }
};

}  // namespace

bool recomputing() { return second_run; }

std::vector<at::Tensor> recompute(Block f, const std::vector<at::Tensor>& x) {
  // Autograd sees the inputs of a TensorList, not those of a vector.
  return Recompute::apply(at::TensorList(x), &f);
}

at::Tensor recompute(std::function<at::Tensor(const at::Tensor&)> f, const at::Tensor& x) {
  auto block = [f = std::move(f)](const std::vector<at::Tensor>& inputs) {
    return std::vector<at::Tensor>{f(inputs[0])};
  };
  return recompute(block, std::vector<at::Tensor>{x})[0];
}

}  // namespace mcore_bridge
