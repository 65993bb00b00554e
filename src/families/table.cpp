#include "families/table.h"

#include <algorithm>

#include "families/family.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {

const std::vector<FamilySpec>& families() {
  static const std::vector<FamilySpec> table = {
      llama_family(),       qwen2_family(),      qwen3_family(),   mistral_family(), qwen2_moe_family(),
      qwen3_moe_family(),   mixtral_family(),    olmoe_family(),   dots1_family(),   ernie4_5_moe_family(),
      glm4_moe_family(),    minimax_m2_family(), gpt_oss_family(), hy_v3_family(),   llama4_text_family(),
      bailing_moe_family(), deepseek_family()};
  return table;
}

const FamilySpec* find_family(const std::string& model_type) {
  for (const auto& family : families()) {
    if (std::find(family.model_types.begin(), family.model_types.end(), model_type) != family.model_types.end())
      return &family;
  }
  return nullptr;
}

const FamilySpec& family_of(const ModelConfig& config) {
  // The original has one family, "gpt", for everything of the ordinary shape; the model_type tells which.
  const auto name = config.mcore_model_type.value_or("gpt");
  for (const auto& family : families()) {
    if (name == family.name) return family;
  }
  const auto* family = name == "gpt" && config.hf_model_type ? find_family(*config.hf_model_type) : nullptr;
  if (family) return *family;
  std::string known;
  for (const auto& spec : families()) known += (known.empty() ? "" : ", ") + spec.name;
  fail("mcore_model_type '", config.mcore_model_type.value_or(""), "' / hf_model_type '",
       config.hf_model_type.value_or(""), "' is no known family; known: ", known);
}

}  // namespace mcore_bridge
