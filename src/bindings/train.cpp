#include "bindings/bindings.h"
#include "bindings/forward_input.h"
#include "mcore_bridge/error.h"
#include "mcore_bridge/schedule.h"
#include "mcore_bridge/trainer.h"
#include "models/gpt_model.h"

namespace mcore_bridge {
namespace {

std::vector<ForwardInput> micro_batches(const std::vector<py::dict>& values) {
  std::vector<ForwardInput> result;
  for (const auto& value : values) result.push_back(forward_input(value, c10::kCPU));
  return result;
}

template <class T>
void take(const py::dict& values, const char* name, T& field) {
  if (!values.contains(name) || values[name].is_none()) return;
  try {
    field = values[name].cast<T>();
  } catch (const py::cast_error&) {
    fail(name, ": ", py::repr(values[name]).cast<std::string>(), " has the wrong type");
  }
}

OptimizerOptions optimizer_options(const py::dict& values) {
  OptimizerOptions options;
  std::set<std::string> known;
#define MCB_OPTION(name)             \
  take(values, #name, options.name); \
  known.insert(#name);
  MCB_OPTION(lr)
  MCB_OPTION(min_lr)
  MCB_OPTION(lr_decay_style)
  MCB_OPTION(lr_decay_iters)
  MCB_OPTION(lr_warmup_iters)
  MCB_OPTION(lr_warmup_init)
  MCB_OPTION(lr_wsd_decay_style)
  MCB_OPTION(lr_wsd_decay_iters)
  MCB_OPTION(train_iters)
  MCB_OPTION(weight_decay)
  MCB_OPTION(clip_grad)
  MCB_OPTION(adam_beta1)
  MCB_OPTION(adam_beta2)
  MCB_OPTION(adam_eps)
  MCB_OPTION(calculate_per_token_loss)
#undef MCB_OPTION
  for (const auto& [key, value] : values) {
    if (!known.contains(key.cast<std::string>()))
      fail<KeyError>("Trainer: unknown option '", key.cast<std::string>(), "'");
  }
  return options;
}

}  // namespace

void init_train(py::module_& module) {
  py::class_<StepResult>(module, "StepResult")
      .def_readonly("iteration", &StepResult::iteration)
      .def_readonly("loss", &StepResult::loss)
      .def_readonly("grad_norm", &StepResult::grad_norm)
      .def_readonly("lr", &StepResult::lr)
      .def_readonly("tokens", &StepResult::tokens)
      .def_readonly("loss_tokens", &StepResult::loss_tokens);

  py::class_<Trainer>(module, "Trainer")
      .def(py::init([](Chunks chunks, const py::dict& options) {
        return std::make_unique<Trainer>(std::move(chunks), optimizer_options(options));
      }))
      .def("train_step",
           [](Trainer& trainer, const std::vector<py::dict>& values) {
             const auto batches = micro_batches(values);
             py::gil_scoped_release release;
             return trainer.train_step(batches);
           })
      .def("evaluate",
           [](Trainer& trainer, const std::vector<py::dict>& values) {
             const auto batches = micro_batches(values);
             py::gil_scoped_release release;
             return trainer.evaluate(batches);
           })
      .def_property_readonly("iteration", &Trainer::iteration);

  module.def("finish_gradients", &finish_gradients, NoGil());
  module.def("learning_rate", [](const py::dict& options, int64_t iteration) {
    return learning_rate(optimizer_options(options), iteration);
  });
  module.def(
      "simulate_schedule",
      [](int stages, int batches, double backward_cost) {
        const auto result = simulate(one_forward_one_backward(stages, batches), batches, backward_cost);
        return std::pair{result.bubble_fraction, result.peak_activations};
      },
      py::arg("stages"), py::arg("micro_batches"), py::arg("backward_cost") = 2.0);
}

}  // namespace mcore_bridge
