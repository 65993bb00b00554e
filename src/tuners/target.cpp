#include "tuners/target.h"

#include <algorithm>
#include <functional>
#include <regex>
#include <set>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

std::string without_suffix(const std::string& name, const std::string& suffix) {
  return name.ends_with(suffix) ? name.substr(0, name.size() - suffix.size()) : name;
}

std::string module_of(const std::string& parameter) {
  const auto dot = parameter.rfind('.');
  return dot == std::string::npos ? parameter : parameter.substr(0, dot);
}

bool names(const std::string& module, const std::string& target) {
  return module == target || module.ends_with("." + target);
}

/// The weight matrix of a decoder linear layer, as opposed to norms, biases and the vocabulary. Routers are no targets,
/// nor experts that Hugging Face keeps in one tensor, which are no modules there.
bool is_linear(const WeightRule& rule) {
  return rule.cols > 0 && !rule.pad_rows && rule.name.ends_with(".weight") && !rule.name.ends_with("router.weight") &&
         !rule.experts.stacked;
}

using Matcher = std::function<bool(const std::string& module)>;

std::vector<LinearTarget> match(const std::vector<WeightRule>& rules, const Matcher& matches) {
  std::vector<LinearTarget> result;
  for (const auto& rule : rules) {
    if (!is_linear(rule)) continue;
    LinearTarget target{without_suffix(rule.name, ".weight"), {}};
    const bool all = matches(target.name);
    for (const auto& hf : rule.hf) target.parts.push_back(all || matches(without_suffix(hf, ".weight")));
    if (std::find(target.parts.begin(), target.parts.end(), true) != target.parts.end())
      result.push_back(std::move(target));
  }
  return result;
}

Matcher matcher(const LoraOptions& options) {
  if (!options.target_regex.empty()) {
    try {
      return [pattern = std::regex(options.target_regex)](const std::string& module) {
        return std::regex_match(module, pattern);
      };
    } catch (const std::regex_error& error) {
      fail("target_regex: '", options.target_regex, "' is not a regular expression: ", error.what());
    }
  }
  return [&options](const std::string& module) {
    return std::any_of(options.target_modules.begin(), options.target_modules.end(),
                       [&](const std::string& target) { return target == "all-linear" || names(module, target); });
  };
}

/// A module is saved in full when its Megatron name or the Hugging Face name of any tensor of it is named.
bool saves(const WeightRule& rule, const std::string& target) {
  return names(module_of(rule.name), target) || std::any_of(rule.hf.begin(), rule.hf.end(), [&](const std::string& hf) {
           return names(module_of(hf), target);
         });
}

std::vector<WeightRule> whole_model(const ModelConfig& config) {
  return chunk_weights(config, {.layers = {0, config.num_layers}, .pre_process = true, .post_process = true});
}

std::string listed(const std::set<std::string>& words) {
  std::string text;
  for (const auto& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

}  // namespace

std::vector<LinearTarget> match_targets(const std::vector<WeightRule>& rules, const LoraOptions& options) {
  return match(rules, matcher(options));
}

std::vector<std::string> match_modules_to_save(const std::vector<WeightRule>& rules, const LoraOptions& options) {
  std::vector<std::string> result;
  for (const auto& rule : rules) {
    if (std::any_of(options.modules_to_save.begin(), options.modules_to_save.end(),
                    [&](const std::string& target) { return saves(rule, target); })) {
      result.push_back(rule.name);
    }
  }
  return result;
}

void check_targets(const ModelConfig& config, const LoraOptions& options) {
  const auto rules = whole_model(config);
  std::set<std::string> known;
  for (const auto& rule : rules) {
    if (!is_linear(rule)) continue;
    const auto module = module_of(rule.name);
    known.insert(module.substr(module.rfind('.') + 1));
    for (const auto& hf : rule.hf) {
      const auto hf_module = module_of(hf);
      known.insert(hf_module.substr(hf_module.rfind('.') + 1));
    }
  }
  if (!options.target_regex.empty()) {
    MCB_CHECK(!match_targets(rules, options).empty(), "target_regex: '", options.target_regex,
              "' matches no module; it must match a whole name such as '", module_of(rules[1].name), "' or '",
              module_of(rules[1].hf[0]), "'; linear modules end in: ", listed(known));
  } else {
    for (const auto& target : options.target_modules) {
      if (target == "all-linear") continue;
      MCB_CHECK(!match(rules, [&](const std::string& module) { return names(module, target); }).empty(),
                "target_modules: '", target, "' names no linear layer of this model; there are: all-linear, ",
                listed(known), " (embeddings and the output layer cannot carry LoRA: put them into modules_to_save)");
    }
  }
  for (const auto& target : options.modules_to_save) {
    bool found = !config.untie_embeddings_and_output_weights && (target == "lm_head" || target == "output_layer");
    for (const auto& rule : rules) {
      if (!saves(rule, target)) continue;
      found = true;
      const bool whole = names(module_of(rule.name), target) ||
                         std::all_of(rule.hf.begin(), rule.hf.end(), [&](const std::string& hf) {
                           return std::any_of(options.modules_to_save.begin(), options.modules_to_save.end(),
                                              [&](const std::string& other) { return names(module_of(hf), other); });
                         });
      MCB_CHECK(whole, "modules_to_save: '", target, "' is one part of the fused ", module_of(rule.name),
                "; name all of its parts or the fused module");
    }
    MCB_CHECK(found, "modules_to_save: '", target, "' names no module of this model");
  }
  if (!config.untie_embeddings_and_output_weights) {
    auto named = [&](std::initializer_list<const char*> list) {
      return std::any_of(list.begin(), list.end(), [&](const char* name) {
        return std::find(options.modules_to_save.begin(), options.modules_to_save.end(), name) !=
               options.modules_to_save.end();
      });
    };
    MCB_CHECK(named({"embed_tokens", "word_embeddings"}) == named({"lm_head", "output_layer"}),
              "modules_to_save: this model ties embed_tokens and lm_head; name both or neither");
  }
}

}  // namespace mcore_bridge
