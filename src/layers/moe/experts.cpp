#include "layers/moe/experts.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "layers/offload.h"
#include "mcore_bridge/error.h"
#include "parallel/random.h"

namespace mcore_bridge {

GroupedParallelLinear::GroupedParallelLinear(Options options, ParallelStatePtr parallel,
                                             at::TensorOptions tensor_options)
    : options_(options),
      parallel_(std::move(parallel)),
      weight_(at::empty({options.experts, options.out, options.in}, tensor_options).requires_grad_(true)) {
  if (options.bias) bias_ = at::empty({options.experts, options.out}, tensor_options).requires_grad_(true);
}

std::string GroupedParallelLinear::kind() const {
  if (!adapters_.empty()) return "LoraParallelLinear";
  return options_.column ? "ColumnParallelGroupedLinear" : "RowParallelGroupedLinear";
}

std::vector<NamedParameter> GroupedParallelLinear::own_parameters() const {
  const bool split = parallel_->etp.size() > 1, column = options_.column;
  const std::string base = adapters_.empty() ? "" : "base_layer.";
  std::vector<NamedParameter> result{{base + "weight", weight_, {.tp_split = split, .expert = true}}};
  if (bias_.defined()) {
    // Only one rank adds a row-parallel bias, so only its gradient is not zero.
    result.push_back(
        {base + "bias",
         bias_,
         {.tp_split = split && column, .sum_over_tp = split && !column, .no_weight_decay = true, .expert = true}});
  }
  for (const auto& [name, adapter] : adapters_) {
    result.push_back({"lora_A." + name + ".weight",
                      adapter.a,
                      {.tp_split = split && !column, .sum_over_tp = split && column, .expert = true}});
    result.push_back({"lora_B." + name + ".weight",
                      adapter.b,
                      {.tp_split = split && column, .sum_over_tp = split && !column, .expert = true}});
  }
  return result;
}

at::Tensor GroupedParallelLinear::forward(const at::Tensor& rows, const ExpertRows& groups) const {
  auto y = grouped_linear(rows, weight_, bias_, groups, options_.column || parallel_->etp.rank() == 0);
  for (const auto& [name, adapter] : adapters_) y = y + adapter_output(adapter, rows, groups);
  return y;
}

at::Tensor GroupedParallelLinear::adapter_output(const GroupedLoraAdapter& adapter, const at::Tensor& rows,
                                                 const ExpertRows& groups) const {
  auto input = rows;
  if (adapter.dropout > 0 && training()) {
    const RandomScope scope(RandomStream::kSplit, *parallel_, rows.device());
    input = at::dropout(rows, adapter.dropout, true);
  }
  const auto low = grouped_linear(input, adapter.a, {}, groups) * adapter.scaling;  // [n, adapted parts * r]
  const auto width = options_.out / options_.parts;
  std::vector<at::Tensor> outputs;
  int64_t at = 0;
  for (const bool adapted : adapter.parts) {
    if (!adapted) {
      outputs.push_back(at::zeros({1, 1}, rows.options()).expand({rows.size(0), width}));
      continue;
    }
    outputs.push_back(grouped_linear(low.narrow(1, at * adapter.r, adapter.r).contiguous(),
                                     adapter.b.narrow(1, at * width, width), {}, groups));
    ++at;
  }
  return outputs.size() == 1 ? outputs[0] : at::cat(outputs, 1);
}

void GroupedParallelLinear::add_adapter(const std::string& name, std::vector<bool> parts, int64_t r, double scaling,
                                        double dropout) {
  MCB_CHECK(!adapters_.contains(name), "add_lora: adapter '", name, "' is there already");
  TORCH_INTERNAL_ASSERT(std::ssize(parts) == options_.parts);
  const auto count = std::count(parts.begin(), parts.end(), true);
  MCB_CHECK(count > 0, "add_lora: no part of the layer is adapted");
  const auto options = weight_.options();
  adapters_[name] = {
      .a = at::empty({options_.experts, count * r, options_.in}, options).requires_grad_(true),
      .b = at::zeros({options_.experts, count * (options_.out / options_.parts), r}, options).requires_grad_(true),
      .parts = std::move(parts),
      .r = r,
      .scaling = scaling,
      .dropout = dropout};
}

Footprint GroupedParallelLinear::footprint(int64_t rows, int64_t computed, const ActivationShape& shape) const {
  const auto e = shape.element, in = options_.in, out = options_.out;
  const bool weight_grad = weight_.requires_grad();
  Footprint result{.output_grad = shape.input_grad || weight_grad || (bias_.defined() && bias_.requires_grad())};
  auto product = [&](const at::Tensor& matrices, bool matrix_grad, bool rows_grad) {
    const auto flops = 2.0 * static_cast<double>(computed * matrices.size(1)) * static_cast<double>(matrices.size(2));
    result.forward_flops += flops;
    result.backward_flops += flops * ((matrix_grad ? 1 : 0) + (rows_grad ? 1 : 0));
  };
  product(weight_, weight_grad, shape.input_grad);
  if (weight_grad) result.deferred += rows * (in + out) * e;
  int64_t saved = 0;
  bool reads_rows = weight_grad;
  for (const auto& [name, adapter] : adapters_) {
    const bool a_grad = adapter.a.requires_grad(), b_grad = adapter.b.requires_grad();
    const auto low = rows * adapter.a.size(1) * e;
    product(adapter.a, a_grad, shape.input_grad);
    const auto flops = 2.0 * static_cast<double>(computed * adapter.b.size(1)) * static_cast<double>(adapter.r);
    result.forward_flops += flops;
    result.backward_flops += flops * ((b_grad ? 1 : 0) + (a_grad || shape.input_grad ? 1 : 0));
    if (b_grad) saved += low;
    if (adapter.dropout > 0) {
      if (shape.input_grad) saved += rows * in * (shape.fused ? 1 : e);  // mask
      if (a_grad) saved += rows * in * e;                                // what it left
    } else {
      reads_rows = reads_rows || a_grad;
    }
    if (a_grad) result.deferred += low + (weight_grad ? 0 : rows * in * e);
    if (b_grad) result.deferred += low + (weight_grad ? 0 : rows * out * e);
    result.output_grad = result.output_grad || a_grad || b_grad;
  }
  const bool keeps_rows = reads_rows && !shape.input_kept;
  if (keeps_rows) saved += rows * in * e;
  if (result.output_grad) {
    result.saved = saved;
    result.offloaded = keeps_rows ? rows * in * e : 0;
  }
  result.workspace = rows * (in + out) * e + (weight_grad ? weight_.numel() * e : 0);
  return result;
}

at::Tensor GroupedParallelLinear::merged_weight(const std::string& name) const {
  at::NoGradGuard no_grad;
  auto merged = weight_.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
  const auto found = adapters_.find(name);
  if (found == adapters_.end()) return weight_.detach().clone();
  const auto& adapter = found->second;
  const auto a = adapter.a.to(at::kFloat), b = adapter.b.to(at::kFloat);
  const auto width = options_.out / options_.parts;
  int64_t at = 0;
  for (int64_t part = 0; part < options_.parts; ++part) {
    if (!adapter.parts[part]) continue;
    merged.narrow(1, part * width, width)
        .baddbmm_(b.narrow(1, at * width, width), a.narrow(1, at * adapter.r, adapter.r), 1, adapter.scaling);
    ++at;
  }
  return merged.to(weight_.scalar_type());
}

Experts::Experts(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options)
    : gate_(gated_options(config)) {
  const auto experts = *config.num_moe_experts / parallel->ep.size();
  const auto width = config.moe_ffn_size() / parallel->etp.size();
  const bool bias = config.add_bias_linear;
  fc1_ = std::make_unique<GroupedParallelLinear>(
      GroupedParallelLinear::Options{
          .experts = experts, .in = config.hidden_size, .out = 2 * width, .parts = 2, .bias = bias},
      parallel, tensor_options);
  fc2_ = std::make_unique<GroupedParallelLinear>(
      GroupedParallelLinear::Options{
          .experts = experts, .in = width, .out = config.hidden_size, .column = false, .bias = bias},
      parallel, tensor_options);
}

at::Tensor Experts::forward(const at::Tensor& rows, const ExpertRows& groups) const {
  const auto gate_up = fc1_->forward(rows, groups);
  const auto activated = gated_activation(gate_up, gate_);
  for (const auto& kept : {rows, gate_up, activated}) ActivationOffload::keep(kept);
  return fc2_->forward(activated, groups);
}

bool Experts::learns() const {
  const auto parameters = named_parameters();
  return std::any_of(parameters.begin(), parameters.end(),
                     [](const NamedParameter& parameter) { return parameter.tensor.requires_grad(); });
}

Footprint Experts::footprint(int64_t rows, int64_t computed, int64_t freed, const ActivationShape& shape) const {
  const auto wide = rows * fc2_->weight().size(2) * shape.element;
  auto first = fc1_->footprint(rows, computed, shape);
  auto inner = shape;
  inner.input_grad = first.output_grad;
  auto second = fc2_->footprint(rows, computed, inner);
  if (!second.output_grad) return {.output_grad = false};
  // Backward frees what it has used: fc2's rows, then what the activation read, then fc1's rows.
  const auto gate_up = first.output_grad ? 2 * wide : 0;
  freed += second.saved;
  // The gradients of both sides of the activation; on the CPU its steps as well.
  const auto activation = (shape.fused ? 3 : 6) * wide;
  second.workspace -= freed - second.saved;
  first.workspace = std::max(activation - freed, first.workspace - freed - gate_up);
  auto result = first;
  result.offloaded += gate_up;
  result.saved += gate_up + fc1_->weight().size(0) * 4;  // the ends of the groups
  const auto workspace = std::max(first.workspace, second.workspace);
  result += second;
  result.workspace = workspace;
  return result;
}

}  // namespace mcore_bridge
