#include "bindings/bindings.h"
#include "bindings/forward_input.h"
#include "bindings/optimizer_fields.h"
#include "core/phase_timer.h"
#include "mcore_bridge/error.h"
#include "mcore_bridge/materialised.h"
#include "mcore_bridge/trainer.h"
#include "models/fp8.h"
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
  for_each_option(options, [&](const char* name, auto& field) {
    take(values, name, field);
    known.insert(name);
  });
  known.insert("lr_mult");
  if (values.contains("lr_mult") && !values["lr_mult"].is_none()) {
    try {  // in the order given: the first match counts
      for (const auto& [pattern, factor] : values["lr_mult"].cast<py::dict>())
        options.lr_mult.emplace_back(pattern.cast<std::string>(), factor.cast<double>());
    } catch (const py::cast_error&) {
      fail("lr_mult: ", py::repr(values["lr_mult"]).cast<std::string>(), " is no map of patterns to factors");
    }
  }
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
      .def_readonly("loss_tokens", &StepResult::loss_tokens)
      .def_readonly("weight_decay", &StepResult::weight_decay)
      .def_readonly("loss_scale", &StepResult::loss_scale)
      .def_readonly("skipped", &StepResult::skipped)
      .def_readonly("spike", &StepResult::spike)
      .def_readonly("skipped_steps", &StepResult::skipped_steps);

  py::class_<MaterialisedParameters>(module, "MaterialisedParameters")
      .def(py::init<std::vector<std::shared_ptr<GPTModel>>>(), NoGil());

  py::class_<Trainer>(module, "Trainer")
      .def(py::init([](Chunks chunks, const py::dict& options) {
        return std::make_unique<Trainer>(std::move(chunks), optimizer_options(options));
      }))
      .def(
          "train_step",
          [](Trainer& trainer, const std::vector<py::dict>& values, double loss_limit) {
            const auto batches = micro_batches(values);
            py::gil_scoped_release release;
            return trainer.train_step(batches, loss_limit);
          },
          py::arg("micro_batches"), py::arg("loss_limit") = INFINITY)
      .def("diagnose",
           [](Trainer& trainer, const std::vector<py::dict>& values) {
             const auto batches = micro_batches(values);
             py::gil_scoped_release release;
             return trainer.diagnose(batches);
           })
      .def("evaluate",
           [](Trainer& trainer, const std::vector<py::dict>& values) {
             const auto batches = micro_batches(values);
             py::gil_scoped_release release;
             return trainer.evaluate(batches);
           })
      .def_property_readonly("memory", &Trainer::memory)
      .def_property_readonly("cuda_graphs", &Trainer::cuda_graphs)
      .def_property("iteration", &Trainer::iteration, &Trainer::set_iteration);

  module.def("take_phase_seconds", &take_phase_seconds);
  module.def("finish_gradients", &finish_gradients, NoGil());
  module.def("update_fp8_scales", &update_fp8_scales, NoGil());
  module.def("fp8_history", &fp8_history);
  module.def("set_fp8_history", &set_fp8_history);
  module.def("learning_rate", [](const py::dict& options, int64_t iteration) {
    return learning_rate(optimizer_options(options), iteration);
  });
}

}  // namespace mcore_bridge
