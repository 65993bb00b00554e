#include "layers/module.h"

namespace mcore_bridge {
namespace {

std::string join(const std::string& prefix, const std::string& name) {
  return prefix.empty() ? name : prefix + "." + name;
}

void visit(const Module& module, const std::string& prefix,
           const std::function<void(const Module&, const std::string&)>& visitor) {
  visitor(module, prefix);
  for (const auto& child : module.children()) visit(*child.module, join(prefix, child.name), visitor);
}

}  // namespace

std::vector<NamedParameter> Module::named_parameters() const {
  std::vector<NamedParameter> result;
  visit(*this, "", [&](const Module& module, const std::string& prefix) {
    for (auto& parameter : module.own_parameters()) {
      result.push_back({join(prefix, parameter.name), std::move(parameter.tensor), parameter.traits});
    }
  });
  return result;
}

std::vector<std::pair<std::string, std::string>> Module::named_modules() const {
  std::vector<std::pair<std::string, std::string>> result;
  visit(*this, "",
        [&](const Module& module, const std::string& prefix) { result.emplace_back(prefix, module.kind()); });
  return result;
}

Footprint Module::footprint(const ActivationShape& shape) const {
  Footprint result{.output_grad = shape.input_grad};
  auto next = shape;
  for (const auto& child : children()) {
    next.input_grad = result.output_grad;
    result += child.module->footprint(next);
  }
  return result;
}

void Module::train(bool on) {
  training_ = on;
  for (const auto& child : children()) child.module->train(on);
}

}  // namespace mcore_bridge
