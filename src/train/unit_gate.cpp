#include "train/unit_gate.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>

#include <algorithm>
#include <utility>

namespace mcore_bridge {
namespace {

/// Inside a backward pass, a forward is a recomputation, and its own backward comes next.
bool in_backward() { return torch::autograd::get_current_node() != nullptr; }

}  // namespace

UnitGate::UnitGate(std::shared_ptr<ParameterBuffers> buffers, int chunk, int units) : buffers_(std::move(buffers)) {
  for (int unit = 0; unit < units; ++unit) units_.push_back(buffers_->buckets_of(chunk, unit));
}

void UnitGate::start(int unit) {
  if (unit < 0 || unit >= static_cast<int>(units_.size())) return;
  for (auto* bucket : units_[unit]) bucket->start_gather();
}

void UnitGate::place(int unit) {
  if (shards_parameters()) {
    if (kept_ >= 0 && kept_ != unit) release(kept_);
    kept_ = -1;
    start(unit);
  }
  for (auto* bucket : units_[unit]) bucket->finish_gather();
}

void UnitGate::release(int unit) {
  if (held_ > 0) return;
  for (auto* bucket : units_[unit]) bucket->release();
}

at::Tensor UnitGate::run(int unit, const at::Tensor& x, const std::function<at::Tensor(const at::Tensor&)>& f) {
  place(unit);
  if (!shards_parameters() || held_ > 0) return f(x);
  const bool backward = in_backward();
  // An embedding's backward needs no weights, and nothing would release them.
  const bool embedding = !x.defined();
  if (!backward || unit > 1) start(backward ? unit - 1 : embedding ? 1 : unit + 1);
  if (!at::GradMode::is_enabled() || embedding) {
    auto y = f(x);
    release(unit);
    return y;
  }

  auto self = shared_from_this();
  const bool told = x.requires_grad();  // its gradient marks the end of the unit's backward
  const auto input = told ? x.view_as(x) : x;
  if (told) {
    input.register_hook([self, unit](const at::Tensor&) { self->release(unit); });
  }
  auto y = f(input);
  if (!y.requires_grad()) {
    release(unit);
    return y;
  }
  y.register_hook([self, unit, told](const at::Tensor&) {
    self->place(unit);
    if (unit > 1) self->start(unit - 1);
    if (!told) torch::autograd::Engine::get_default_engine().queue_callback([self, unit] { self->release(unit); });
  });
  if (backward || unit + 1 == static_cast<int>(units_.size())) {
    kept_ = unit;
  } else {
    release(unit);
  }
  return y;
}

void UnitGate::hold(const std::function<bool(const std::string&)>& wanted) {
  ++held_;
  for (const auto& buckets : units_) {
    for (auto* bucket : buckets) {
      const auto& entries = bucket->entries();
      if (wanted && std::none_of(entries.begin(), entries.end(),
                                 [&](const Bucket::Entry& entry) { return wanted(entry.parameter->name); }))
        continue;
      bucket->start_gather();
      bucket->finish_gather();
    }
  }
}

void UnitGate::release_all() {
  if (--held_ > 0) return;
  for (size_t unit = 0; unit < units_.size(); ++unit) {
    for (auto* bucket : units_[unit]) bucket->take_over();
    release(static_cast<int>(unit));
  }
}

}  // namespace mcore_bridge
