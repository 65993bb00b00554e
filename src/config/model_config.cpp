#include "mcore_bridge/model_config.h"

#include <algorithm>

#include "config/field_value.h"
#include "config/pipeline_layout.h"
#include "config/unsupported.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {

ModelConfig ModelConfig::from_json(const Json& values) {
  MCB_CHECK(values.is_object(), "ModelConfig: expected an object of fields, found ", values.type_name());
  ModelConfig config;
  for (const auto& [key, value] : values.items()) {
    bool known = false;
#define MCB_FIELD(type, name, default_value, doc)                \
  if (!known && key == #name) {                                  \
    known = true;                                                \
    if (!value.is_null()) read_field(#name, value, config.name); \
  }
#include "mcore_bridge/model_config.def"
#undef MCB_FIELD
    if (!known) check_unsupported(key, value);
  }
  return config;
}

Json ModelConfig::to_json() const {
  Json result = Json::object();
#define MCB_FIELD(type, name, default_value, doc) result[#name] = write_field(name);
#include "mcore_bridge/model_config.def"
#undef MCB_FIELD
  return result;
}

std::vector<std::string> field_names() {
  return {
#define MCB_FIELD(type, name, default_value, doc) #name,
#include "mcore_bridge/model_config.def"
#undef MCB_FIELD
  };
}

Json config_fields() {
  const ModelConfig defaults;
  Json result = Json::array();
#define MCB_FIELD(type, name, default_value, doc)                                                                 \
  result.push_back({                                                                                              \
    {"name", #name}, {"type", field_type(defaults.name)}, {"default", write_field(defaults.name)}, { "doc", doc } \
  });
#include "mcore_bridge/model_config.def"
#undef MCB_FIELD
  return result;
}

bool ModelConfig::has_window(int64_t layer) const {
  if (window_size.empty() || window_size[0] < 0) return false;
  if (window_attn_skip_freq.empty()) return true;
  return window_attn_skip_freq.expand(num_layers, 0, "window_attn_skip_freq").at(layer) == 1;
}

bool ModelConfig::is_moe_layer(int64_t layer) const {
  if (!is_moe()) return false;
  if (moe_layer_freq.every) return layer % *moe_layer_freq.every == 0;
  return moe_layer_freq.list.empty() || moe_layer_freq.list.at(layer) == 1;
}

bool ModelConfig::recomputes(const std::string& module) const {
  if (recompute_granularity != "selective") return false;
  if (recompute_modules.empty()) return module == "core_attn";
  return std::find(recompute_modules.begin(), recompute_modules.end(), module) != recompute_modules.end();
}

bool ModelConfig::has_rope(int64_t layer) const {
  if (position_embedding_type != "rope") return false;
  if (no_rope_freq.empty()) return true;
  return no_rope_freq.expand(num_layers, 1, "no_rope_freq").at(layer) == 0;
}

ParallelSizes ModelConfig::parallel_sizes() const {
  return {.tensor = static_cast<int>(tensor_model_parallel_size),
          .pipeline = static_cast<int>(pipeline_model_parallel_size),
          .virtual_pipeline = static_cast<int>(virtual_stages()),
          .context = static_cast<int>(context_parallel_size),
          .expert = static_cast<int>(expert_model_parallel_size),
          .expert_tensor = static_cast<int>(expert_tensor_parallel_size.value_or(tensor_model_parallel_size))};
}

LayerRange ModelConfig::layers_of(int pp_rank, int vp_stage) const {
  return pipeline_layout(*this).at(vp_stage * pipeline_model_parallel_size + pp_rank).layers;
}

}  // namespace mcore_bridge
