// From a Hugging Face config.json to ModelConfig fields: one table of names, then the family's own rules.
#include <filesystem>
#include <fstream>
#include <sstream>

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
      {"rope_scaling", {"rope_parameters", "rope_scaling"}},
      {"padded_vocab_size", {"vocab_size"}},
      {"untie_embeddings_and_output_weights", {"tie_word_embeddings"}, Convert::kNot},
      {"hidden_act", {"hidden_act", "hidden_activation"}, Convert::kActivation},
      {"add_qkv_bias", {"attention_bias", "qkv_bias", "use_bias"}},
      {"add_mlp_bias", {"mlp_bias"}},
      {"qk_layernorm", {"use_qk_norm", "qk_norm"}},
      {"init_method_std", {"initializer_range"}},
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

void read_keys(const Json& hf, Json& fields, bool nested) {
  for (const auto& row : key_table()) {
    for (const auto* key : row.keys) {
      const auto found = hf.find(key);
      if (found == hf.end() || found->is_null()) continue;
      fields[row.field] = converted(key, *found, row.convert);
      break;
    }
  }
  if (const auto type = hf.find("model_type"); type != hf.end() && type->is_string()) {
    fields[nested ? "llm_model_type" : "hf_model_type"] = *type;
  }
  for (const auto* name : kNested) {
    if (const auto inner = hf.find(name); inner != hf.end() && inner->is_object()) read_keys(*inner, fields, true);
  }
}

const Json& text_part(const Json& hf) {
  for (const auto* name : kNested) {
    if (const auto inner = hf.find(name); inner != hf.end() && inner->is_object()) return text_part(*inner);
  }
  return hf;
}

/// rope_theta and partial_rotary_factor may live inside the scaling dictionary, which may also say nothing at all.
void unpack_rope(Json& fields) {
  auto rope = fields.find("rope_scaling");
  if (rope == fields.end()) return;
  MCB_CHECK(rope->is_object(), "config.json: rope_scaling is ", rope->dump(), ", expected a dictionary");
  if (rope->contains("type") && !rope->contains("rope_type")) (*rope)["rope_type"] = (*rope)["type"];
  if (rope->contains("rope_theta")) fields["rotary_base"] = (*rope)["rope_theta"];
  if (rope->contains("partial_rotary_factor")) fields["partial_rotary_factor"] = (*rope)["partial_rotary_factor"];
  if (rope->value("rope_type", std::string("default")) == "default") fields.erase("rope_scaling");
}

}  // namespace

Json ModelConfig::from_hf(const Json& hf) {
  MCB_CHECK(hf.is_object(), "config.json: expected an object, found ", hf.type_name());
  Json fields = Json::object();
  read_keys(hf, fields, false);
  if (!fields.contains("hf_model_type")) fail<KeyError>("config.json: model_type is missing");
  if (!fields.contains("llm_model_type")) fields["llm_model_type"] = fields["hf_model_type"];
  const auto type = fields["hf_model_type"].get<std::string>();
  const auto* family = find_family(type);
  if (!family) {
    std::string known;
    for (const auto& spec : families()) {
      for (const auto& name : spec.model_types) known += (known.empty() ? "" : ", ") + name;
    }
    fail("config.json: model_type '", type, "' is not supported by this version; supported: ", known);
  }
  if (const auto quantised = hf.find("quantization_config"); quantised != hf.end() && quantised->is_object()) {
    fail("config.json: quantised checkpoints (", quantised->value("quant_method", std::string("unknown")),
         ") are not read by this version; use the bfloat16 original");
  }
  fields["mcore_model_type"] = family->name;
  unpack_rope(fields);
  if (family->configure) family->configure(fields, text_part(hf));
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
