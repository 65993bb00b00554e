#include "bindings/bindings.h"
#include "bindings/forward_input.h"
#include "models/gpt_model.h"

namespace mcore_bridge {

void init_model(py::module_& module) {
  py::class_<GPTModel, std::shared_ptr<GPTModel>>(module, "GPTModel")
      .def(py::init([](const ModelConfig& config, const std::shared_ptr<ParallelState>& parallel, int vp_stage,
                       const std::string& device) { return build_model(config, parallel, vp_stage, device); }),
           py::arg("config"), py::arg("parallel"), py::arg("vp_stage") = 0, py::arg("device") = "cpu")
      .def("named_parameters",
           [](const GPTModel& model) {
             std::vector<std::pair<std::string, at::Tensor>> result;
             for (auto& parameter : model.named_parameters()) result.emplace_back(parameter.name, parameter.tensor);
             return result;
           })
      .def(
          "tp_split",
          [](const GPTModel& model) {
            std::map<std::string, bool> result;
            for (auto& parameter : model.named_parameters()) result[parameter.name] = parameter.traits.tp_split;
            return result;
          },
          "Which parameters are split over the tensor-parallel ranks")
      .def("named_modules", &GPTModel::named_modules)
      .def("train", &GPTModel::train)
      .def_property_readonly("pre_process", [](const GPTModel& model) { return model.place().pre_process; })
      .def_property_readonly("post_process", [](const GPTModel& model) { return model.place().post_process; })
      .def_property_readonly("first_layer", [](const GPTModel& model) { return model.place().layers.first; })
      .def_property_readonly("num_layers", [](const GPTModel& model) { return model.place().layers.count; })
      .def_property_readonly("adapters",
                             [](const GPTModel& model) {
                               std::vector<std::string> names;
                               for (const auto& [name, options] : model.lora_options) names.push_back(name);
                               return names;
                             })
      .def(
          "forward",
          [](GPTModel& model, const py::dict& input, bool gather_output) {
            const auto arguments = forward_input(input, model.device());
            py::gil_scoped_release release;
            return model.forward(arguments, gather_output);
          },
          py::arg("input"), py::arg("gather_output") = false);

  module.def("forward_all_stages", [](const std::vector<std::shared_ptr<GPTModel>>& chunks, const py::dict& input) {
    const auto arguments = forward_input(input, chunks.at(0)->device());
    py::gil_scoped_release release;
    return forward_all_stages(chunks, arguments);
  });
}

}  // namespace mcore_bridge
