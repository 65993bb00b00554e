#include "bindings/bindings.h"
#include "bindings/forward_input.h"
#include "mcore_bridge/error.h"
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
             for (auto& parameter : model.named_parameters()) {
               if (!parameter.traits.buffer) result.emplace_back(parameter.name, parameter.tensor);
             }
             return result;
           })
      .def("named_buffers",
           [](const GPTModel& model) {
             std::vector<std::pair<std::string, at::Tensor>> result;
             for (auto& parameter : model.named_parameters()) {
               if (parameter.traits.buffer) result.emplace_back(parameter.name, parameter.tensor);
             }
             return result;
           })
      .def(
          "tp_split",
          [](const GPTModel& model) {
            std::map<std::string, bool> result;
            for (auto& parameter : model.named_parameters()) {
              // Experts differ between ranks in their own way.
              result[parameter.name] = parameter.traits.tp_split || parameter.traits.expert;
            }
            return result;
          },
          "Which parameters are split over the tensor-parallel ranks")
      .def("named_modules", &GPTModel::named_modules)
      .def(
          "set_weight",
          [](GPTModel& model, const std::string& name, const at::Tensor& values) {
            for (const auto& [linear, layer] : model.linears()) {
              if (linear + ".weight" == name) return layer->set_weight_values(values);
            }
            fail<KeyError>("set_weight: the model has no linear layer with '", name, "'");
          },
          py::arg("name"), py::arg("values"), NoGil(),
          "Fills a linear layer's weight with values (no FP8 codes), by its name without an adapter's base_layer. "
          "Collective over the tensor-parallel ranks.")
      .def("make_room_for_adapters", &GPTModel::make_room_for_adapters,
           "Moves frozen weights to where the memory behind each row takes an adapter's B, so that a layer's product "
           "and its adapter's are one. Training on a GPU does this by itself.")
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
      .def_property_readonly("num_routers", [](GPTModel& model) { return model.routers().size(); })
      .def("record_routing",
           [](GPTModel& model) {
             for (auto* router : model.routers()) {
               router->replay().recorded.clear();
               router->replay().recording = true;
             }
           })
      .def("recorded_routing",
           [](GPTModel& model) {
             std::vector<std::vector<at::Tensor>> result;
             for (auto* router : model.routers()) {
               router->replay().recording = false;
               result.push_back(std::exchange(router->replay().recorded, {}));
             }
             return result;
           })
      .def("replay_routing",
           [](GPTModel& model, std::vector<std::vector<at::Tensor>> choices) {
             const auto routers = model.routers();
             for (size_t i = 0; i < routers.size(); ++i)
               routers[i]->replay() = {.recording = routers[i]->replay().recording,
                                       .recorded = std::move(routers[i]->replay().recorded),
                                       .given = std::move(choices.at(i))};
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
