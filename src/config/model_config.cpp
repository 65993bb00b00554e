#include "mcore_bridge/model_config.h"

#include <algorithm>

#include "config/field_value.h"
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
  const int64_t stages = pipeline_model_parallel_size, chunks = virtual_stages();
  const auto first = num_layers_in_first_pipeline_stage, last = num_layers_in_last_pipeline_stage;
  if (first || last) {
    // Layers of the stages in between are spread evenly; finalize() has checked that they divide.
    const int64_t fixed = (first ? 1 : 0) + (last ? 1 : 0), middle = num_layers - first.value_or(0) - last.value_or(0);
    const int64_t each = stages > fixed ? middle / (stages - fixed) : 0;
    auto size = [&](int64_t stage) {
      if (first && stage == 0) return *first;
      if (last && stage == stages - 1) return *last;
      return each;
    };
    LayerRange range;
    for (int64_t stage = 0; stage < pp_rank; ++stage) range.first += size(stage);
    range.count = size(pp_rank);
    return range;
  }
  // The embedding and the loss count as layers of the first and the last chunk.
  const int64_t before = account_for_embedding_in_pipeline_split ? 1 : 0,
                after = account_for_loss_in_pipeline_split ? 1 : 0;
  const int64_t per_chunk = (num_layers + before + after) / (stages * chunks);
  const int64_t index = static_cast<int64_t>(vp_stage) * stages + pp_rank;
  LayerRange range{index * per_chunk - (index > 0 ? before : 0), per_chunk};
  if (index == 0) range.count -= before;
  if (index == stages * chunks - 1) range.count -= after;
  return range;
}

}  // namespace mcore_bridge
