#include "bindings/bindings.h"
#include "config/rope_scaling.h"
#include "families/family.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

Json parse(const std::string& text) {
  try {
    return Json::parse(text);
  } catch (const Json::exception& error) {
    fail("not JSON: ", error.what());
  }
}

}  // namespace

void init_config(py::module_& module) {
  py::class_<ModelConfig>(module, "ModelConfig")
      .def_static("from_json",
                  [](const std::string& text) {
                    auto config = ModelConfig::from_json(parse(text));
                    config.finalize();
                    return config;
                  })
      .def("to_json", [](const ModelConfig& config) { return config.to_json().dump(); })
      .def("layers_of", [](const ModelConfig& config, int pp_rank, int vp_stage) {
        const auto range = config.layers_of(pp_rank, vp_stage);
        return std::pair{range.first, range.count};
      });
  module.def("hf_to_mcore_config", [](const std::string& text) { return ModelConfig::from_hf(parse(text)).dump(); });
  module.def("config_fields", [] { return config_fields().dump(); });
  module.def("rope_frequencies", [](const ModelConfig& config, int64_t length) {
    const auto result = rope_frequencies(config, length);
    return std::pair{result.inv_freq, result.attention_scaling};
  });
  module.def("families", [] {
    std::vector<std::tuple<std::string, std::vector<std::string>, std::string>> rows;
    for (const auto& family : families()) rows.emplace_back(family.name, family.model_types, family.documentation);
    return rows;
  });
  module.def(
      "hf_names",
      [](const ModelConfig& config) {
        std::vector<std::string> names;
        for (const auto& rule : chunk_weights(config, {.layers = {0, config.num_layers}}))
          names.insert(names.end(), rule.hf.begin(), rule.hf.end());
        return names;
      },
      "Every Hugging Face tensor of the model, in file order");
}

}  // namespace mcore_bridge
