#include "mcore_bridge/bridge.h"

#include <pybind11/functional.h>

#include "bindings/bindings.h"
#include "bridge/checkpoint_reader.h"
#include "bridge/inspect.h"
#include "mcore_bridge/error.h"
#include "models/gpt_model.h"
#include "tuners/adapter_rules.h"

namespace mcore_bridge {
namespace {

/// What Python's side of a converter returns: names, and (shape, dtype, value) of what it changes.
using Convert = std::function<
    std::pair<std::map<std::string, std::optional<std::string>>,
              std::map<std::string, std::tuple<std::vector<int64_t>, at::ScalarType, std::function<at::Tensor()>>>>(
        const CheckpointReader*)>;

/// What Python's side of a converter says about a tensor to be saved: new name, function of the value (or none), shape
/// and dtype of its result.
using ConvertSaved = std::function<std::optional<
    std::tuple<std::string, std::function<at::Tensor(const at::Tensor&)>, std::vector<int64_t>, at::ScalarType>>(
    const std::string&, const std::vector<int64_t>&, at::ScalarType)>;

}  // namespace

void init_bridge(py::module_& module) {
  module.def(
      "load_weights",
      [](const Chunks& chunks, const std::string& folder, bool peft_format, const std::string& adapter_name,
         bool strict, Convert convert, Progress progress) {
        LoadOptions options{.peft_format = peft_format,
                            .adapter_name = adapter_name,
                            .strict = strict,
                            .progress = std::move(progress)};
        if (convert) {
          options.convert = [&](const CheckpointReader& reader) {
            auto [names, changed] = convert(&reader);
            Conversion conversion{.names = std::move(names)};
            for (auto& [name, value] : changed) {
              auto& [shape, dtype, make] = value;
              conversion.changed[name] = {std::move(shape), dtype, std::move(make)};
            }
            return conversion;
          };
        }
        const auto report = load_weights(chunks, folder, options);
        return std::tuple{report.bytes_read, report.bytes_needed, report.missing, report.unexpected};
      },
      py::arg("chunks"), py::arg("folder"), py::kw_only(), py::arg("peft_format"), py::arg("adapter_name"),
      py::arg("strict"), py::arg("convert"), py::arg("progress"), NoGil());

  py::class_<CheckpointReader>(module, "CheckpointReader")
      .def(py::init<const std::string&, bool>(), py::arg("path"), py::arg("peft_format") = false, NoGil())
      .def("tensors",
           [](const CheckpointReader& reader) {
             // (name, dtype or None when torch has none, shape)
             std::vector<std::tuple<std::string, std::optional<at::ScalarType>, std::vector<int64_t>>> result;
             for (const auto& [name, tensor] : reader.tensors()) {
               const auto dtype = tensor.entry->dtype;
               result.emplace_back(name, dtype == at::ScalarType::Undefined ? std::nullopt : std::optional(dtype),
                                   tensor.entry->shape);
             }
             return result;
           })
      .def("load", &CheckpointReader::load, py::arg("name"), NoGil());

  module.def(
      "save_weights",
      [](const Chunks& chunks, const std::string& folder, bool peft_format, const std::string& adapter_name,
         bool merge_lora, int64_t max_shard_bytes, std::vector<std::pair<std::string, std::string>> extra_files,
         ConvertSaved convert, const std::string& quantization, Progress progress) {
        SaveOptions options{.peft_format = peft_format,
                            .adapter_name = adapter_name,
                            .merge_lora = merge_lora,
                            .max_shard_bytes = max_shard_bytes,
                            .quantization = quantization,
                            .progress = std::move(progress),
                            .extra_files = std::move(extra_files)};
        if (convert) {
          options.convert = [&](const std::string& name, const std::vector<int64_t>& shape,
                                c10::ScalarType dtype) -> std::optional<SavedTensor> {
            auto saved = convert(name, shape, dtype);
            if (!saved) return std::nullopt;
            auto& [new_name, value, new_shape, new_dtype] = *saved;
            return SavedTensor{std::move(new_name), std::move(value), std::move(new_shape), new_dtype};
          };
        }
        save_weights(chunks, folder, options);
      },
      py::arg("chunks"), py::arg("folder"), py::kw_only(), py::arg("peft_format"), py::arg("adapter_name"),
      py::arg("merge_lora"), py::arg("max_shard_bytes"), py::arg("extra_files"), py::arg("convert"),
      py::arg("quantization"), py::arg("progress"), NoGil());

  py::class_<WeightExporter>(module, "WeightExporter")
      .def(py::init([](Chunks chunks, bool peft_format, const std::string& adapter_name, bool merge_lora,
                       bool only_master, int64_t bucket_bytes, const std::string& quantization) {
             return std::make_unique<WeightExporter>(std::move(chunks), ExportOptions{.peft_format = peft_format,
                                                                                      .adapter_name = adapter_name,
                                                                                      .merge_lora = merge_lora,
                                                                                      .only_master = only_master,
                                                                                      .bucket_bytes = bucket_bytes,
                                                                                      .quantization = quantization});
           }),
           py::arg("chunks"), py::kw_only(), py::arg("peft_format"), py::arg("adapter_name"), py::arg("merge_lora"),
           py::arg("only_master"), py::arg("bucket_bytes"), py::arg("quantization"), NoGil())
      .def("__len__", &WeightExporter::count)
      .def(
          "next",
          [](WeightExporter& exporter) -> std::optional<std::pair<std::string, at::Tensor>> {
            std::string name;
            at::Tensor tensor;
            if (!exporter.next(name, tensor)) return std::nullopt;
            return std::pair{name, tensor};
          },
          NoGil());

  module.def("initialize", &initialize, py::arg("chunks"), py::arg("seed"), NoGil());

  py::class_<LoraOptions>(module, "LoraOptions")
      .def(py::init<>())
      .def_readwrite("r", &LoraOptions::r)
      .def_readwrite("lora_alpha", &LoraOptions::lora_alpha)
      .def_readwrite("lora_dropout", &LoraOptions::lora_dropout)
      .def_readwrite("use_rslora", &LoraOptions::use_rslora)
      .def_readwrite("target_modules", &LoraOptions::target_modules)
      .def_readwrite("target_regex", &LoraOptions::target_regex)
      .def_readwrite("modules_to_save", &LoraOptions::modules_to_save)
      .def_readwrite("seed", &LoraOptions::seed);
  module.def("add_lora", &add_lora, py::arg("chunks"), py::arg("options"), py::arg("adapter_name"), NoGil());
  module.def("peft_adapter_config",
             [](const Chunks& chunks, const std::string& adapter_name, const std::string& base_model) {
               const auto& model = *chunks.at(0);
               const auto options = model.lora_options.find(adapter_name);
               if (options == model.lora_options.end()) fail<KeyError>("the model has no adapter '", adapter_name, "'");
               return std::pair{peft_config(model.config(), options->second, base_model).dump(),
                                experts_share_names(model.config(), options->second)};
             });
  module.def("inspect_checkpoint", [](const std::string& path) { return inspect_checkpoint(path).dump(); }, NoGil());
}

}  // namespace mcore_bridge
