// From a Hugging Face config.json to ModelConfig fields: one table of names, then the family's own rules.
#include <filesystem>
#include <fstream>
#include <sstream>

#include "config/json_value.h"
#include "config/quantization.h"
#include "families/family.h"
#include "mcore_bridge/error.h"
#include "mcore_bridge/model_config.h"

namespace mcore_bridge {
namespace {

enum class Convert { kAsIs, kNot, kActivation };

struct KeyRow {
  const char* field;
  std::vector<const char*> keys;  ///< the first that exists and is not null counts
  Convert convert = Convert::kAsIs;
};

const std::vector<KeyRow>& key_table() {
  static const std::vector<KeyRow> rows = {
      {"num_layers", {"num_hidden_layers"}},
      {"hidden_size", {"hidden_size"}},
      {"ffn_hidden_size", {"intermediate_size"}},
      {"num_attention_heads", {"num_attention_heads"}},
      {"num_query_groups", {"num_key_value_heads"}},
      {"kv_channels", {"head_dim"}},
      {"max_position_embeddings", {"max_position_embeddings"}},
      {"original_max_position_embeddings", {"original_max_position_embeddings"}},
      {"attention_dropout", {"attention_dropout"}},
      {"layernorm_epsilon", {"rms_norm_eps"}},
      {"rotary_base", {"rope_theta"}},
      {"partial_rotary_factor", {"partial_rotary_factor"}},
      {"padded_vocab_size", {"vocab_size"}},
      {"untie_embeddings_and_output_weights", {"tie_word_embeddings"}, Convert::kNot},
      {"hidden_act", {"hidden_act", "hidden_activation"}, Convert::kActivation},
      {"add_qkv_bias", {"attention_bias", "qkv_bias", "use_bias"}},
      {"add_mlp_bias", {"mlp_bias"}},
      {"qk_layernorm", {"use_qk_norm", "qk_norm"}},
      {"init_method_std", {"initializer_range"}},
      {"num_moe_experts", {"num_experts", "n_routed_experts", "moe_num_experts", "num_local_experts"}},
      {"moe_ffn_hidden_size", {"moe_intermediate_size"}},
      {"moe_shared_expert_intermediate_size", {"shared_expert_intermediate_size"}},
      {"moe_router_bias_update_rate", {"aux_loss_alpha"}},
      {"moe_router_norm_min", {"moe_norm_min"}},
      {"clip_qkv", {"clip_qkv"}},
      {"moe_router_topk", {"num_experts_per_tok", "moe_topk", "moe_k"}},
      {"moe_router_score_function", {"scoring_func"}},
      {"moe_router_pre_softmax", {"norm_topk_prob"}, Convert::kNot},
      {"moe_router_topk_scaling_factor", {"routed_scaling_factor", "router_scaling_factor"}},
      {"moe_router_num_groups", {"n_group"}},
      {"moe_router_group_topk", {"topk_group"}},
  };
  return rows;
}

struct ActivationName {
  const char* hf;
  const char* ours;
};
constexpr ActivationName kActivations[] = {
    {"silu", "silu"},          {"swish", "silu"},          {"gelu", "gelu"},
    {"gelu_new", "gelu_tanh"}, {"gelu_fast", "gelu_tanh"}, {"gelu_pytorch_tanh", "gelu_tanh"},
};

Json converted(const char* key, const Json& value, Convert convert) {
  if (convert == Convert::kNot) {
    MCB_CHECK(value.is_boolean(), "config.json: ", key, " is ", value.dump(), ", expected true or false");
    return !value.get<bool>();
  }
  if (convert == Convert::kActivation) {
    for (const auto& name : kActivations) {
      if (value == name.hf) return name.ours;
    }
    fail("config.json: ", key, " ", value.dump(),
         " is not supported; supported: silu, gelu, gelu_new, gelu_pytorch_tanh");
  }
  return value;
}

const char* const kNested[] = {"text_config", "llm_config", "thinker_config"};

constexpr const char* kFile = "config.json";

/// The RoPE dictionary under either of its names, `type` renamed to `rope_type`; null when there is none.
Json rope_dictionary(const Json& hf) {
  auto read = [&](const char* key) {
    const auto* found = json_find(hf, key);
    if (!found) return Json(nullptr);
    MCB_CHECK(found->is_object(), "config.json: ", key, " is ", found->dump(), ", expected a dictionary");
    for (const auto& [name, value] : found->items()) {
      MCB_CHECK(!value.is_object(), "config.json: ", key, " differs per layer type (", name,
                "), which this version does not support");
    }
    if (found->empty()) return Json(nullptr);
    Json rope = *found;
    rope["rope_type"] = json_string(rope, "rope_type", json_string(rope, "type", "default", key), key);
    rope.erase("type");
    return rope;
  };
  auto newer = read("rope_parameters");
  const auto older = read("rope_scaling");
  if (newer.is_null()) return older;
  for (const auto& [key, value] : older.items()) {
    MCB_CHECK(newer.contains(key) && newer[key] == value, "config.json: rope_scaling has ", key, " ", value.dump(),
              ", rope_parameters ", newer.contains(key) ? newer[key].dump() : "does not",
              "; keep one dictionary: Transformers 5 writes rope_parameters");
  }
  return newer;
}

void read_keys(const Json& hf, Json& fields, bool nested) {
  for (const auto& row : key_table()) {
    for (const auto* key : row.keys) {
      const auto found = hf.find(key);
      if (found == hf.end() || found->is_null()) continue;
      fields[row.field] = converted(key, *found, row.convert);
      break;
    }
  }
  if (auto rope = rope_dictionary(hf); !rope.is_null()) fields["rope_scaling"] = std::move(rope);
  if (const auto type = hf.find("model_type"); type != hf.end() && type->is_string()) {
    fields[nested ? "llm_model_type" : "hf_model_type"] = *type;
  }
  for (const auto* name : kNested) {
    if (const auto inner = hf.find(name); inner != hf.end() && inner->is_object()) read_keys(*inner, fields, true);
  }
}

Json& text_part(Json& hf) {
  for (const auto* name : kNested) {
    if (const auto inner = hf.find(name); inner != hf.end() && inner->is_object()) return text_part(*inner);
  }
  return hf;
}

/// rope_theta and partial_rotary_factor may live inside the RoPE dictionary, which may also say nothing else. They move
/// out of it, so that an override of rotary_base meets no second value.
void unpack_rope(Json& fields) {
  const auto found = fields.find("rope_scaling");
  if (found == fields.end()) return;
  Json rope = std::move(*found);
  fields.erase(found);
  auto move_out = [&](const char* key, const char* field) {
    if (const auto* value = json_find(rope, key)) fields[field] = *value;
    rope.erase(key);
  };
  move_out("rope_theta", "rotary_base");
  move_out("partial_rotary_factor", "partial_rotary_factor");
  if (rope["rope_type"] != "default") fields["rope_scaling"] = std::move(rope);
}

}  // namespace

Json ModelConfig::from_hf(const Json& hf_config) {
  MCB_CHECK(hf_config.is_object(), "config.json: expected an object, found ", hf_config.type_name());
  const auto type = json_string(hf_config, "model_type", "", kFile);
  if (type.empty()) fail<KeyError>("config.json: model_type is missing");
  const auto* family = find_family(type);
  if (!family) {
    std::string known;
    for (const auto& spec : families()) {
      for (const auto& name : spec.model_types) known += (known.empty() ? "" : ", ") + name;
    }
    fail("config.json: model_type '", type, "' is not supported by this version; supported: ", known);
  }
  Json hf = hf_config;
  auto& text = text_part(hf);
  read_quantization(hf);  // refuses what the bridge cannot read
  // An explicit null stays: there it means "none", not "as usual".
  for (const auto& [key, value] : family->hf_defaults.items()) {
    if (!text.contains(key)) text[key] = value;
  }
  Json fields = Json::object();
  read_keys(hf, fields, false);
  if (!fields.contains("llm_model_type")) fields["llm_model_type"] = type;
  fields["mcore_model_type"] = family->name;
  unpack_rope(fields);
  if (family->configure) family->configure(fields, text);
  std::string missing;
  for (const char* field :
       {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "padded_vocab_size"}) {
    if (fields.contains(field)) continue;
    for (const auto& row : key_table()) {
      if (std::string(row.field) == field) missing += (missing.empty() ? "" : ", ") + std::string(row.keys[0]);
    }
  }
  if (!missing.empty()) fail<KeyError>("config.json: missing ", missing);
  return fields;
}

ModelConfig ModelConfig::from_folder(const std::string& folder, const Json& overrides) {
  const auto path = std::filesystem::path(folder) / "config.json";
  std::ifstream file(path);
  if (!file)
    fail<FileNotFoundError>(path.string(), ": cannot be opened; a Hugging Face model folder holds config.json");
  Json hf;
  try {
    hf = Json::parse(file);
  } catch (const Json::exception& error) {
    fail(path.string(), ": not JSON: ", error.what());
  }
  auto fields = from_hf(hf);
  fields.update(overrides);
  auto config = from_json(fields);
  config.finalize();
  return config;
}

}  // namespace mcore_bridge
