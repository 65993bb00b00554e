#include "mcore_bridge/planner.h"

#include "bindings/bindings.h"
#include "bindings/optimizer_fields.h"
#include "core/cpu_memory.h"
#include "mcore_bridge/error.h"
#include "models/gpt_model.h"

namespace mcore_bridge {
namespace {

template <class T>
void take(const Json& values, const char* name, T& field) {
  if (const auto found = values.find(name); found != values.end() && !found->is_null()) field = found->get<T>();
}

RunSizes run_sizes(const Json& values) {
  RunSizes run;
  take(values, "processes", run.processes);
  take(values, "micro_batch_size", run.micro_batch_size);
  take(values, "global_batch_size", run.global_batch_size);
  take(values, "sequence_length", run.sequence_length);
  return run;
}

Hardware hardware(const Json& values) {
  std::string name = "h100";
  take(values, "name", name);
  auto result = name == "custom" ? Hardware{.name = name} : Hardware::named(name);
  take(values, "memory", result.memory);
  take(values, "peak_flops", result.peak_flops);
  take(values, "memory_bandwidth", result.memory_bandwidth);
  take(values, "link_bandwidth", result.link_bandwidth);
  take(values, "network_bandwidth", result.network_bandwidth);
  take(values, "gpus_per_node", result.gpus_per_node);
  take(values, "matmul_efficiency", result.matmul_efficiency);
  take(values, "bandwidth_efficiency", result.bandwidth_efficiency);
  return result;
}

/// Other keys are ignored.
OptimizerOptions optimizer(const Json& values) {
  OptimizerOptions options;
  for_each_option(options, [&](const char* name, auto& field) { take(values, name, field); });
  return options;
}

/// Keys as in PlanRequest and RunSizes; "hardware" and "fixed" are objects of their own.
PlanRequest plan_request(const ModelConfig& config, const Json& values, const std::optional<LoraOptions>& lora) {
  PlanRequest request{.config = config, .run = run_sizes(values), .lora = lora};
  take(values, "documents", request.documents);
  take(values, "frozen", request.frozen);
  request.optimizer = optimizer(values.value("optimizer", Json::object()));
  take(values, "memory", request.memory);
  take(values, "reserve", request.reserve);
  take(values, "margin", request.margin);
  take(values, "gpu_kernels", request.gpu_kernels);
  request.hardware = hardware(values.value("hardware", Json::object()));
  return request;
}

Fixed fixed_sizes(const Json& values) {
  Fixed fixed;
  take(values, "tensor_model_parallel_size", fixed.tensor);
  take(values, "pipeline_model_parallel_size", fixed.pipeline);
  take(values, "virtual_pipeline_model_parallel_size", fixed.virtual_pipeline);
  take(values, "context_parallel_size", fixed.context);
  take(values, "expert_model_parallel_size", fixed.expert);
  take(values, "sequence_parallel", fixed.sequence_parallel);
  take(values, "micro_batch_size", fixed.micro_batch);
  take(values, "recompute_granularity", fixed.recompute);
  return fixed;
}

}  // namespace

void init_planner(py::module_& module) {
  using py::literals::operator""_a;
  module.def(
      "segments",
      [](const GPTModel& model, int64_t batch, int64_t sequence, int64_t documents, bool gpu_kernels,
         bool training_loss) {
        const ActivationShape shape{.sequence = sequence,
                                    .batch = batch,
                                    .element = static_cast<int64_t>(c10::elementSize(model.config().params_dtype)),
                                    .documents = documents,
                                    .context = model.config().context_parallel_size,
                                    .fused = gpu_kernels,
                                    .training_loss = training_loss};
        py::list result;
        for (const auto& segment : model.segments(shape)) {
          const auto& footprint = segment.footprint;
          result.append(py::dict("name"_a = segment.name, "layers"_a = segment.layers, "saved"_a = footprint.saved,
                                 "offloaded"_a = footprint.offloaded, "workspace"_a = footprint.workspace,
                                 "forward_flops"_a = footprint.forward_flops,
                                 "backward_flops"_a = footprint.backward_flops));
        }
        return result;
      },
      "What one micro-batch costs in each part of a model, by the formulae of the planner", py::arg("model"),
      py::arg("batch"), py::arg("sequence"), py::arg("documents") = 1, py::arg("gpu_kernels") = false,
      py::arg("training_loss") = true);
  module.def(
      "plan_layout",
      [](const ModelConfig& config, const std::string& values, const std::optional<LoraOptions>& lora) {
        return to_json(plan_layout(plan_request(config, Json::parse(values), lora))).dump();
      },
      py::arg("config"), py::arg("values"), py::arg("lora") = std::nullopt, NoGil());
  module.def(
      "nearest_fitting",
      [](const ModelConfig& config, const std::string& values, const std::optional<LoraOptions>& lora) {
        const auto plan = nearest_fitting(plan_request(config, Json::parse(values), lora));
        return plan ? to_json(*plan).dump() : std::string("null");
      },
      py::arg("config"), py::arg("values"), py::arg("lora") = std::nullopt, NoGil());
  module.def(
      "search_layouts",
      [](const ModelConfig& config, const std::string& text, const std::optional<LoraOptions>& lora, int count) {
        const auto values = Json::parse(text);
        Json result = Json::array();
        for (const auto& plan : search_layouts(plan_request(config, values, lora),
                                               fixed_sizes(values.value("fixed", Json::object())), count)) {
          result.push_back(to_json(plan));
        }
        return result.dump();
      },
      py::arg("config"), py::arg("values"), py::arg("lora"), py::arg("count"), NoGil());
  module.def("count_cpu_memory", &count_cpu_memory, "From here on CPU tensors are counted");
  module.def(
      "cpu_memory", [] { return std::pair{cpu_memory().allocated, cpu_memory().peak}; }, "(allocated, peak) bytes");
  module.def("reset_peak_cpu_memory", &reset_peak_cpu_memory);
  module.def("hardware_names", [] {
    std::vector<std::string> names;
    for (const auto& row : Hardware::table()) names.push_back(row.name);
    return names;
  });
  module.def(
      "check_layout",
      [](const std::string& fields, const std::string& run) {
        auto values = Json::parse(fields);
        const auto asked = ModelConfig::from_json(values);
        // The model itself first, so that its own mistakes are not taken for the layout's.
        auto whole = with_layout(asked, Layout{});
        whole.pipeline_schedule = "1f1b";
        whole.num_layers_in_first_pipeline_stage = whole.num_layers_in_last_pipeline_stage = {};
        whole.account_for_embedding_in_pipeline_split = whole.account_for_loss_in_pipeline_split = false;
        whole.finalize();
        check_layout(asked, run_sizes(Json::parse(run)));
      },
      "Throws ValueError with the nearest layout that works, before anything is built", py::arg("fields"),
      py::arg("run"), NoGil());
}

}  // namespace mcore_bridge
