#include "bindings/bindings.h"
#include "bindings/forward_input.h"
#include "core/phase_timer.h"
#include "mcore_bridge/error.h"
#include "mcore_bridge/materialised.h"
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
  MCB_OPTION(weight_decay_incr_style)
  MCB_OPTION(start_weight_decay)
  MCB_OPTION(end_weight_decay)
  MCB_OPTION(optimizer)
  MCB_OPTION(sgd_momentum)
  MCB_OPTION(muon_momentum)
  MCB_OPTION(muon_split_qkv)
  MCB_OPTION(muon_use_nesterov)
  MCB_OPTION(muon_scale_mode)
  MCB_OPTION(muon_num_ns_steps)
  MCB_OPTION(muon_coefficient_type)
  MCB_OPTION(muon_fp32_matmul_prec)
  MCB_OPTION(muon_tp_mode)
  MCB_OPTION(muon_extra_scale_factor)
  MCB_OPTION(muon_scalar_optimizer)
  MCB_OPTION(use_distributed_optimizer)
  MCB_OPTION(data_parallel_sharding_strategy)
  MCB_OPTION(overlap_grad_reduce)
  MCB_OPTION(overlap_param_gather)
  MCB_OPTION(ddp_bucket_size)
  MCB_OPTION(main_grads_dtype)
  MCB_OPTION(main_params_dtype)
  MCB_OPTION(exp_avg_dtype)
  MCB_OPTION(exp_avg_sq_dtype)
  MCB_OPTION(optimizer_cpu_offload)
  MCB_OPTION(optimizer_offload_fraction)
  MCB_OPTION(loss_scale)
  MCB_OPTION(initial_loss_scale)
  MCB_OPTION(min_loss_scale)
  MCB_OPTION(loss_scale_window)
  MCB_OPTION(hysteresis)
#undef MCB_OPTION
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
      .def_property("iteration", &Trainer::iteration, &Trainer::set_iteration);

  module.def("take_phase_seconds", &take_phase_seconds);
  module.def("finish_gradients", &finish_gradients, NoGil());
  module.def("learning_rate", [](const py::dict& options, int64_t iteration) {
    return learning_rate(optimizer_options(options), iteration);
  });
}

}  // namespace mcore_bridge
