#include "bridge/checkpoint_plan.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <set>

#include "mcore_bridge/error.h"
#include "models/gpt_model.h"
#include "tuners/adapter_rules.h"

namespace mcore_bridge {
namespace {

const LoraOptions& adapter_options(const GPTModel& model, const std::string& name) {
  const auto found = model.lora_options.find(name);
  if (found == model.lora_options.end()) {
    std::string known;
    for (const auto& [other, options] : model.lora_options) known += (known.empty() ? "" : ", ") + other;
    fail<KeyError>("the model has no adapter '", name, "' (", known.empty() ? "none at all" : "there are: " + known,
                   "); add_lora makes one");
  }
  return found->second;
}

std::vector<WeightRule> selected_rules(const GPTModel& model, const std::vector<WeightRule>& base,
                                       const Selection& selection) {
  return selection.peft_format
             ? adapter_rules(base, adapter_options(model, selection.adapter_name), selection.adapter_name)
             : base;
}

std::string without_base_layer(std::string name) {
  if (const auto at = name.find("base_layer."); at != std::string::npos) name.erase(at, 11);
  return name;
}

}  // namespace

std::vector<PlannedParameter> planned_parameters(const Chunks& chunks, const Selection& selection) {
  MCB_CHECK(!chunks.empty(), "bridge: no model given");
  std::vector<PlannedParameter> result;
  for (const auto& chunk : chunks) {
    std::map<std::string, at::Tensor> tensors;
    for (auto& parameter : chunk->named_parameters()) tensors[without_base_layer(parameter.name)] = parameter.tensor;
    std::map<std::string, ParallelLinear*> linears;
    for (const auto& [name, layer] : chunk->linears()) linears[name + ".weight"] = layer;
    std::map<std::string, const GroupedParallelLinear*> experts;
    for (const auto& [name, layer] : chunk->grouped_linears()) experts[name + ".weight"] = layer;
    if (selection.merge_lora) adapter_options(*chunk, selection.adapter_name);
    const auto ranks = chunk->parallel().split_ranks();
    for (auto& plan : make_plan(selected_rules(*chunk, chunk->rules(), selection), ranks)) {
      const auto found = tensors.find(plan.name);
      TORCH_INTERNAL_ASSERT(found != tensors.end(), "the plan's ", plan.name, " is no parameter");
      const auto tensor = found->second;
      TORCH_INTERNAL_ASSERT(tensor.sizes() == at::IntArrayRef(plan.sizes), plan.name, " is ", tensor.sizes(),
                            ", the plan says ", plan.sizes);
      const auto linear = linears.find(plan.name);
      std::function<at::Tensor()> value = [tensor] { return tensor.detach(); };
      auto* in_fp8 = linear != linears.end() && linear->second->weight_in_fp8() ? linear->second : nullptr;
      if (in_fp8) value = [in_fp8] { return in_fp8->weight_values(); };
      if (selection.merge_lora && linear != linears.end()) {
        value = [layer = linear->second, name = selection.adapter_name] { return layer->merged_weight(name); };
      }
      if (const auto grouped = experts.find(plan.name); selection.merge_lora && grouped != experts.end()) {
        value = [layer = grouped->second, name = selection.adapter_name] { return layer->merged_weight(name); };
      }
      const auto dtype = in_fp8 ? chunk->config().params_dtype : tensor.scalar_type();
      result.push_back({std::move(plan), tensor, std::move(value), dtype, in_fp8});
    }
  }
  return result;
}

const Group& replicas_of(const ParameterPlan& plan, const ParallelState& parallel) {
  return parallel.replicas(plan.rule.experts.total > 0);
}

std::vector<PlannedParameter> owned_parameters(const Chunks& chunks, const Selection& selection) {
  auto parameters = planned_parameters(chunks, selection);
  const auto& parallel = chunks[0]->parallel();
  const auto& copy = parallel.model.ranks();
  std::erase_if(parameters, [&](const PlannedParameter& parameter) {
    const auto& replicas = replicas_of(parameter.plan, parallel);
    const auto first = std::find_first_of(replicas.ranks().begin(), replicas.ranks().end(), copy.begin(), copy.end());
    return *first != replicas.ranks()[replicas.rank()];
  });
  return parameters;
}

std::unique_ptr<MaterialisedParameters> in_place(const Chunks& chunks, const Selection& selection) {
  if (!selection.peft_format) return std::make_unique<MaterialisedParameters>(chunks);
  std::set<std::string> names;  // an adapter alone: the base may be too large for one rank
  for (const auto& parameter : planned_parameters(chunks, selection)) names.insert(parameter.plan.name);
  return std::make_unique<MaterialisedParameters>(
      chunks, [&](const std::string& name) { return names.contains(without_base_layer(name)); });
}

std::vector<HfTensor> whole_checkpoint(const Chunks& chunks, const Selection& selection) {
  const auto& model = *chunks.at(0);
  const auto base = chunk_weights(model.config(), {.layers = {0, model.config().num_layers}});
  std::vector<HfTensor> result;
  std::set<std::string> seen;
  for (const auto& plan : make_plan(selected_rules(model, base, selection), 0, 1)) {
    for (const auto& tensor : plan.tensors) {
      if (seen.insert(tensor.name).second) result.push_back(tensor);
    }
  }
  return result;
}

std::map<std::string, std::vector<OwnedRegion>> owned_regions(const std::vector<PlannedParameter>& parameters) {
  std::map<std::string, std::vector<OwnedRegion>> result;
  for (const auto& parameter : parameters) {
    for (const auto& region : parameter.plan.regions) {
      if (region.owner) result[parameter.plan.tensors[region.tensor].name].push_back({&parameter, &region});
    }
  }
  return result;
}

}  // namespace mcore_bridge
