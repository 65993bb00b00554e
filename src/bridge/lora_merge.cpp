#include "bridge/lora_merge.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/ArrayRef.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

constexpr const char* kPrefix = "base_model.model.";
constexpr const char* kA = ".lora_A.weight";
constexpr const char* kB = ".lora_B.weight";

std::vector<float> values_of(const LogicalTensor& tensor) {
  std::vector<float> values;
  tensor.read(0, tensor.rows, values);
  return values;
}

/// PEFT's rule: a pattern stands for the module's whole name or a dotted suffix of it. Null when none matches.
const Json* find_pattern(const Json& patterns, const std::string& module) {
  if (!patterns.is_object()) return nullptr;
  for (const auto& [pattern, value] : patterns.items()) {
    if (std::regex_match(module, std::regex("(.*\\.)?(" + pattern + ")"))) return &value;
  }
  return nullptr;
}

}  // namespace

void LoraMerge::read_config(const std::string& folder) {
  const auto path = std::filesystem::path(folder) / "adapter_config.json";
  std::ifstream file(path);
  if (!file) fail<FileNotFoundError>(folder, ": holds no adapter_config.json");
  try {
    config_ = Json::parse(file);
  } catch (const nlohmann::json::exception& error) {
    fail(path.string(), ": not JSON: ", error.what());
  }
  const auto type = config_.value("peft_type", std::string());
  MCB_CHECK(type == "LORA", path.string(), ": peft_type '", type, "' cannot be merged; only LORA can");
  for (const char* key : {"use_dora", "fan_in_fan_out", "lora_bias"}) {
    const auto found = config_.find(key);
    const bool on = found != config_.end() && found->is_boolean() && found->get<bool>();
    MCB_CHECK(!on, path.string(), ": ", key, " adapters are not merged by this version; PEFT's merge_and_unload does");
  }
  MCB_CHECK(config_.value("bias", std::string("none")) == "none", path.string(),
            ": trained biases (bias = ", config_["bias"].dump(), ") are not merged by this version");
}

float LoraMerge::scaling_of(const std::string& module, int64_t rank) const {
  double alpha = config_.value("lora_alpha", 8.0);
  if (const auto patterns = config_.find("alpha_pattern"); patterns != config_.end()) {
    if (const auto* found = find_pattern(*patterns, module)) alpha = found->get<double>();
  }
  const bool rslora = config_.value("use_rslora", false);
  return static_cast<float>(alpha / (rslora ? std::sqrt(static_cast<double>(rank)) : static_cast<double>(rank)));
}

LoraMerge::LoraMerge(const std::string& folder, const std::vector<LogicalTensor>& weights) {
  read_config(folder);
  reader_ = std::make_unique<CheckpointReader>(folder, true);
  std::map<std::string, const LogicalTensor*> known;
  for (const auto& weight : weights) known[weight.name] = &weight;
  std::map<std::string, LogicalTensor> tensors;
  for (auto& tensor : logical_tensors(*reader_, {})) tensors.emplace(tensor.name, std::move(tensor));

  std::vector<std::string> unknown;
  for (const auto& [name, tensor] : tensors) {
    MCB_CHECK(name.starts_with(kPrefix), folder, ": '", name, "' is no name of a PEFT adapter (", kPrefix, "...)");
    const auto inner = name.substr(std::string(kPrefix).size());
    MCB_CHECK(tensor.source, folder, ": '", name, "' holds no floating point numbers");
    if (inner.ends_with(kB)) {
      MCB_CHECK(tensors.contains(name.substr(0, name.size() - 14) + kA), folder, ": '", name, "' has no lora_A");
      continue;
    }
    if (!inner.ends_with(kA)) {
      MCB_CHECK(inner.find("lora_") == std::string::npos, folder, ": '", name,
                "' is not merged by this version (only linear layers are); PEFT's merge_and_unload does");
      const auto weight = known.find(inner);
      // A tied output layer has no tensor of its own in the checkpoint.
      if (weight == known.end() && inner != "lm_head.weight") {
        unknown.push_back(inner);
        continue;
      }
      MCB_CHECK(weight == known.end() || weight->second->shape == tensor.shape, folder, ": '", name,
                "' has another shape than the model's ", inner);
      replaced_.emplace(inner, tensor);
      continue;
    }
    const auto module = inner.substr(0, inner.size() - 14);
    const auto b = tensors.find(kPrefix + module + kB);
    MCB_CHECK(b != tensors.end(), folder, ": '", name, "' has no lora_B");
    const auto weight = known.find(module + ".weight");
    if (weight == known.end()) {
      unknown.push_back(module);
      continue;
    }
    const auto& shape = weight->second->shape;
    const auto rank = tensor.rows;
    MCB_CHECK(shape.size() == 2 && tensor.shape.size() == 2 && b->second.shape.size() == 2 && rank > 0 &&
                  tensor.shape[1] == shape[1] && b->second.shape[0] == shape[0] && b->second.shape[1] == rank,
              folder, ": the adapter of ", module, " does not fit its weight: A and B are ",
              c10::IntArrayRef(tensor.shape), " and ", c10::IntArrayRef(b->second.shape), ", the weight is ",
              c10::IntArrayRef(shape));
    MCB_CHECK(weight->second->source, "the weight of ", module, " holds no floating point numbers");
    pairs_[weight->first] = {values_of(tensor), values_of(b->second), rank, tensor.cols, scaling_of(module, rank)};
  }
  if (!unknown.empty()) {
    fail<KeyError>(folder, ": ", unknown.size(), " modules of the adapter are not in the model, e.g. '", unknown[0],
                   "': is it another model's adapter?");
  }
  MCB_CHECK(!pairs_.empty() || !replaced_.empty(), folder, ": the adapter is empty");
}

void LoraMerge::add(const std::string& weight, int64_t first, int64_t count, float* values) const {
  const auto& pair = pairs_.at(weight);
  const at::NoGradGuard no_grad;
  auto target = at::from_blob(values, {count, pair.cols}, at::kFloat);
  const auto a = at::from_blob(const_cast<float*>(pair.a.data()), {pair.rank, pair.cols}, at::kFloat);
  const auto b = at::from_blob(const_cast<float*>(pair.b.data()) + first * pair.rank, {count, pair.rank}, at::kFloat);
  target.addmm_(b, a, 1, pair.scaling);
}

}  // namespace mcore_bridge
