// Readings of config.json that several families share.
#include <algorithm>

#include "config/json_value.h"
#include "families/table.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

constexpr const char* kFile = "config.json";

/// Transformers counts the token itself: token i sees keys j with i - j < sliding_window.
Json window_of(const Json& hf) {
  const auto window = json_int(hf, "sliding_window", 0, kFile);
  MCB_CHECK(window > 0, "config.json: sliding_window is ", window, ", expected a positive number");
  return Json::array({window - 1, 0});
}

}  // namespace

void set_biases(Json& values, bool qkv, bool attention_proj, bool mlp) {
  values["add_qkv_bias"] = qkv;
  values["add_attention_proj_bias"] = attention_proj;
  values["add_mlp_bias"] = mlp;
}

void set_attention_biases(Json& values, const Json& hf, bool mlp) {
  const bool attention = json_bool(hf, "attention_bias", false, kFile);
  set_biases(values, attention, attention, mlp);
}

void set_window_on_all_layers(Json& values, const Json& hf) {
  if (json_find(hf, "sliding_window")) values["window_size"] = window_of(hf);
}

void set_moe_layers(Json& values, const Json& hf, const std::function<bool(int64_t layer)>& sparse) {
  Json flags = Json::array();
  const auto layers = json_int(hf, "num_hidden_layers", 0, kFile);
  for (int64_t layer = 0; layer < layers; ++layer) flags.push_back(sparse(layer) ? 1 : 0);
  values["moe_layer_freq"] = std::move(flags);
}

void set_sparse_step_layers(Json& values, const Json& hf) {
  const auto step = json_int(hf, "decoder_sparse_step", 1, kFile);
  MCB_CHECK(step > 0, "config.json: decoder_sparse_step is ", step, ", expected a positive number");
  const auto* dense = json_find(hf, "mlp_only_layers");
  set_moe_layers(values, hf, [&](int64_t layer) {
    const bool named = dense && dense->is_array() && std::find(dense->begin(), dense->end(), layer) != dense->end();
    return !named && (layer + 1) % step == 0;
  });
}

void set_layers_behind_dense_ones(Json& values, const Json& hf) {
  const auto* types = json_find(hf, "mlp_layer_types");
  if (!types) {
    const auto dense = json_int(hf, "first_k_dense_replace", 0, kFile);
    return set_moe_layers(values, hf, [&](int64_t layer) { return layer >= dense; });
  }
  const auto layers = json_int(hf, "num_hidden_layers", 0, kFile);
  MCB_CHECK(types->is_array() && static_cast<int64_t>(types->size()) == layers,
            "config.json: mlp_layer_types must list one word for each of the ", layers, " layers, found ",
            types->dump());
  set_moe_layers(values, hf, [&](int64_t layer) { return (*types)[static_cast<size_t>(layer)] == "sparse"; });
}

void set_shared_experts(Json& values, const Json& hf, const char* count_key) {
  values["moe_shared_expert_intermediate_size"] =
      json_int(hf, count_key, 0, kFile) * json_int(hf, "moe_intermediate_size", 0, kFile);
}

void set_sigmoid_router(Json& values) {
  values["moe_router_score_function"] = "sigmoid";
  values["moe_router_enable_expert_bias"] = true;
}

void set_window_by_layer_types(Json& values, const Json& hf) {
  auto named = hf;
  named["use_sliding_window"] = true;
  if (json_find(hf, "layer_types")) set_window_on_some_layers(values, named);
}

void set_window_on_some_layers(Json& values, const Json& hf) {
  const bool on = json_bool(hf, "use_sliding_window", false, kFile) && json_find(hf, "sliding_window");
  const auto layers = json_int(hf, "num_hidden_layers", 0, kFile);
  Json flags = Json::array();
  bool any = false;
  if (const auto* types = json_find(hf, "layer_types")) {
    MCB_CHECK(types->is_array() && static_cast<int64_t>(types->size()) == layers,
              "config.json: layer_types must list one word for each of the ", layers, " layers, found ", types->dump());
    for (const auto& type : *types) {
      MCB_CHECK(type == "sliding_attention" || type == "full_attention", "config.json: layer_types has ", type.dump(),
                "; supported: full_attention, sliding_attention");
      flags.push_back(type == "sliding_attention" ? 1 : 0);
      any = any || flags.back() == 1;
    }
    MCB_CHECK(on || !any,
              "config.json: layer_types names sliding_attention, but use_sliding_window is off or "
              "sliding_window null");
  } else {
    const auto full = json_int(hf, "max_window_layers", 0, kFile);
    for (int64_t layer = 0; on && layer < layers; ++layer) flags.push_back(layer >= full ? 1 : 0);
    any = on && layers > full;
  }
  if (!any) return;
  values["window_size"] = window_of(hf);
  values["window_attn_skip_freq"] = std::move(flags);
}

}  // namespace mcore_bridge
