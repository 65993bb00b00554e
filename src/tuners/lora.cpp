// LoRA: adds adapters beside the linear layers and freezes the rest. Source: https://arxiv.org/abs/2106.09685, with
// PEFT's scaling (rsLoRA: https://arxiv.org/abs/2312.03732) and initialisation.
#include "mcore_bridge/lora.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "mcore_bridge/bridge.h"
#include "mcore_bridge/error.h"
#include "models/gpt_model.h"
#include "plan/initialize.h"
#include "tuners/adapter_rules.h"
#include "tuners/target.h"

namespace mcore_bridge {

double LoraOptions::scaling() const {
  return use_rslora ? lora_alpha / std::sqrt(static_cast<double>(r)) : lora_alpha / static_cast<double>(r);
}

void LoraOptions::validate() const {
  MCB_CHECK(r > 0, "lora r: ", r, " must be at least 1");
  MCB_CHECK(lora_dropout >= 0 && lora_dropout < 1, "lora_dropout: ", lora_dropout, " must be in [0, 1)");
  MCB_CHECK(!target_modules.empty() || !target_regex.empty(),
            "target_modules: no module is named; use all-linear or list some");
}

void add_lora(const Chunks& chunks, const LoraOptions& options, const std::string& adapter_name) {
  options.validate();
  MCB_CHECK(!chunks.empty(), "add_lora: no model given");
  MCB_CHECK(!adapter_name.empty() && adapter_name.find('.') == std::string::npos, "add_lora: adapter name '",
            adapter_name, "' must be a word without dots");
  check_targets(chunks[0]->config(), options);
  for (const auto& chunk : chunks) {
    const auto rules = chunk->rules();
    const bool first_adapter = chunk->lora_options.empty();
    std::map<std::string, ParallelLinear*> linears;
    for (const auto& [name, layer] : chunk->linears()) linears[name] = layer;
    std::map<std::string, GroupedParallelLinear*> experts;
    for (const auto& [name, layer] : chunk->grouped_linears()) experts[name] = layer;
    for (auto& target : match_targets(rules, options)) {
      auto add = [&](auto* layer) {
        layer->add_adapter(adapter_name, target.parts, options.r, options.scaling(), options.lora_dropout);
      };
      if (const auto found = experts.find(target.name); found != experts.end()) {
        add(found->second);
      } else {
        add(linears.at(target.name));
      }
    }
    chunk->lora_options[adapter_name] = options;
    chunk->modules_to_save = match_modules_to_save(rules, options);

    std::map<std::string, at::Tensor> parameters;
    for (auto& parameter : chunk->named_parameters()) {
      if (parameter.traits.buffer) continue;
      const bool adapter =
          parameter.name.find(".lora_A.") != std::string::npos || parameter.name.find(".lora_B.") != std::string::npos;
      auto plain = parameter.name;
      if (const auto at = plain.find("base_layer."); at != std::string::npos) plain.erase(at, 11);
      const auto& kept = chunk->modules_to_save;
      const bool saved = std::find(kept.begin(), kept.end(), plain) != kept.end();
      if (!adapter && (first_adapter || saved)) parameter.tensor.set_requires_grad(saved);
      parameters[parameter.name] = parameter.tensor;
    }
    for (const auto& [name, layer] : chunk->linears()) {
      if (layer->weight_in_fp8() && !layer->weight().requires_grad()) layer->wide().forget();
    }
    const auto ranks = chunk->parallel().split_ranks();
    for (const auto& rule : adapter_rules(rules, options, adapter_name)) {
      if (rule.init != WeightRule::Init::kKaimingUniform || chunk->device().is_meta()) continue;
      initialize_parameter(parameters.at(rule.name), plan_parameter(rule, ranks), options.seed, 0.0, 1);
    }
  }
}

}  // namespace mcore_bridge
