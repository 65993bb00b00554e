#include "tuners/adapter_rules.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "plan/plan.h"
#include "tuners/target.h"

namespace mcore_bridge {
namespace {

constexpr const char* kPeftPrefix = "base_model.model.";

std::string module_of(const std::string& weight) { return weight.substr(0, weight.rfind('.')); }

int64_t present_rows(const WeightRule& base, const std::vector<bool>& parts) {
  const auto rows = part_rows(base);
  int64_t sum = 0;
  for (size_t i = 0; i < parts.size(); ++i) sum += parts[i] ? rows[i] : 0;
  return sum;
}

}  // namespace

std::vector<WeightRule> adapter_rules(const std::vector<WeightRule>& base, const LoraOptions& options,
                                      const std::string& adapter_name) {
  std::map<std::string, std::vector<bool>> targets;
  for (auto& target : match_targets(base, options)) targets[target.name + ".weight"] = std::move(target.parts);
  const auto saved = match_modules_to_save(base, options);
  const bool last_stage = std::any_of(base.begin(), base.end(),
                                      [](const auto& rule) { return rule.name == "decoder.final_layernorm.weight"; });
  const bool has_output =
      std::any_of(base.begin(), base.end(), [](const auto& rule) { return rule.name == "output_layer.weight"; });

  std::vector<WeightRule> result;
  std::vector<WeightRule> tied_heads;  // go last, where lm_head stands in files
  for (const auto& rule : base) {
    if (const auto target = targets.find(rule.name); target != targets.end()) {
      const auto& parts = target->second;
      auto file_names = [&](const char* matrix) {
        std::vector<std::string> names;
        for (size_t i = 0; i < parts.size(); ++i)
          names.push_back(parts[i] ? kPeftPrefix + module_of(rule.hf[i]) + matrix : "");
        return names;
      };
      const auto module = module_of(rule.name);
      const auto count = std::count(parts.begin(), parts.end(), true);
      const bool row = rule.shard == Shard::kRow;
      result.push_back({.name = module + ".lora_A." + adapter_name + ".weight",
                        .hf = file_names(".lora_A.weight"),
                        .rows = count * options.r,
                        .cols = rule.cols,
                        .shard = row ? Shard::kRow : Shard::kReplicated,
                        .fuse = parts.size() > 1 ? Fuse::kStack : Fuse::kNone,
                        .experts = rule.experts,
                        .init = WeightRule::Init::kKaimingUniform});
      result.push_back({.name = module + ".lora_B." + adapter_name + ".weight",
                        .hf = file_names(".lora_B.weight"),
                        .rows = present_rows(rule, parts),
                        .cols = options.r,
                        .shard = row ? Shard::kReplicated : rule.shard,
                        .fuse = rule.fuse,
                        .heads = rule.heads,
                        .grouping = rule.grouping,
                        .experts = rule.experts,
                        .init = WeightRule::Init::kZero});
    }
    if (std::find(saved.begin(), saved.end(), rule.name) == saved.end()) continue;
    auto whole = rule;
    for (auto& name : whole.hf) name = kPeftPrefix + name;
    if (rule.copy) {
      // The tied output layer of a last stage: PEFT keeps embed_tokens and lm_head apart, so it is written under its
      // own name.
      whole.hf = {std::string(kPeftPrefix) + "lm_head.weight"};
      whole.copy = false;
    }
    result.push_back(whole);
    if (rule.name == "embedding.word_embeddings.weight" && last_stage && !has_output) {
      whole.hf = {std::string(kPeftPrefix) + "lm_head.weight"};
      tied_heads.push_back(whole);
    }
  }
  result.insert(result.end(), tied_heads.begin(), tied_heads.end());
  return result;
}

bool experts_share_names(const ModelConfig& config, const LoraOptions& options) {
  const auto rules = chunk_weights(config, {.layers = {0, config.num_layers}});
  std::set<std::string> experts, others;
  for (const auto& target : match_targets(rules, options)) {
    for (const auto& rule : rules) {
      if (rule.name != target.name + ".weight") continue;
      for (size_t i = 0; i < target.parts.size(); ++i) {
        const auto module = module_of(rule.hf[i]);
        if (target.parts[i]) (rule.experts.total > 0 ? experts : others).insert(module.substr(module.rfind('.') + 1));
      }
    }
  }
  return std::any_of(experts.begin(), experts.end(), [&](const auto& leaf) { return others.contains(leaf); });
}

Json peft_config(const ModelConfig& config, const LoraOptions& options, const std::string& base_model) {
  const auto rules = chunk_weights(config, {.layers = {0, config.num_layers}});
  std::set<std::string> adapted, all, leaves, saved;
  for (const auto& target : match_targets(rules, options)) {
    const auto rule =
        std::find_if(rules.begin(), rules.end(), [&](const auto& r) { return r.name == target.name + ".weight"; });
    for (size_t i = 0; i < target.parts.size(); ++i) {
      if (!target.parts[i]) continue;
      const auto module = module_of(rule->hf[i]);
      for (int64_t e = 0; e < std::max<int64_t>(1, rule->experts.total); ++e) {
        auto one = module;
        if (const auto at = one.find("{e}"); at != std::string::npos) one.replace(at, 3, std::to_string(e));
        adapted.insert(one);
      }
      all.insert(module);
      leaves.insert(module.substr(module.rfind('.') + 1));
    }
  }
  // Leaf names say it all when every module of that leaf name is adapted; else each module is named.
  bool whole = true;
  for (const auto& rule : rules) {
    for (const auto& hf : rule.hf) {
      const auto module = module_of(hf);
      if (leaves.contains(module.substr(module.rfind('.') + 1)) && !all.contains(module)) whole = false;
    }
  }
  for (const auto& name : match_modules_to_save(rules, options)) {
    for (const auto& rule : rules) {
      if (rule.name != name) continue;
      for (const auto& hf : rule.hf) {
        const auto module = module_of(hf);
        saved.insert(module.substr(module.rfind('.') + 1));
      }
    }
  }
  if (!config.untie_embeddings_and_output_weights && saved.contains("embed_tokens")) saved.insert("lm_head");
  const bool integral = options.lora_alpha == std::floor(options.lora_alpha);
  return {{"peft_type", "LORA"},
          {"task_type", "CAUSAL_LM"},
          {"base_model_name_or_path", base_model},
          {"r", options.r},
          {"lora_alpha", integral ? Json(static_cast<int64_t>(options.lora_alpha)) : Json(options.lora_alpha)},
          {"lora_dropout", options.lora_dropout},
          {"use_rslora", options.use_rslora},
          {"target_modules", whole ? leaves : adapted},
          {"modules_to_save", saved.empty() ? Json(nullptr) : Json(saved)},
          {"bias", "none"},
          {"fan_in_fan_out", false},
          {"init_lora_weights", true},
          {"inference_mode", true}};
}

}  // namespace mcore_bridge
