#include "layers/linear.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "layers/norm.h"
#include "layers/offload.h"
#include "layers/sequence_linear.h"
#include "layers/weight_gradients.h"
#include "mcore_bridge/error.h"
#include "parallel/collectives.h"
#include "parallel/random.h"

namespace mcore_bridge {
namespace {

/// Widths of the fused parts inside one block of the local output, and how many such blocks there are: one block per
/// key/value head for QKV, a single block otherwise.
struct PartLayout {
  int64_t blocks = 1;
  std::vector<int64_t> widths;
};

PartLayout part_layout(const LinearOptions& options, int tp) {
  const int split = options.shard == Shard::kColumn ? tp : 1;
  switch (options.fuse) {
    case Fuse::kQkv: {
      const auto& heads = options.heads;
      const auto groups = std::max<int64_t>(1, heads.groups / split);
      return {groups, {heads.heads / split / groups * heads.head_dim, heads.head_dim, heads.head_dim}};
    }
    case Fuse::kGateUp:
      return {1, {options.out / 2 / split, options.out / 2 / split}};
    default:
      return {1, {options.out / split}};
  }
}

int64_t total(const PartLayout& layout) {
  int64_t sum = 0;
  for (auto width : layout.widths) sum += width;
  return sum * layout.blocks;
}

}  // namespace

ParallelLinear::ParallelLinear(LinearOptions options, ParallelStatePtr parallel, at::TensorOptions tensor_options)
    : options_(options), parallel_(std::move(parallel)) {
  const auto tp = parallel_->tp.size();
  const auto rows = total(part_layout(options_, tp));
  const auto columns = options_.shard == Shard::kRow ? options_.in / tp : options_.in;
  weight_ = at::empty({rows, columns}, tensor_options).requires_grad_(true);
  if (options_.bias) bias_ = at::empty({rows}, tensor_options).requires_grad_(true);
  if (options_.norm) layer_norm_weight_ = at::empty({options_.in}, tensor_options).requires_grad_(true);
}

std::string ParallelLinear::kind() const {
  if (!adapters_.empty()) return "LoraParallelLinear";
  if (options_.shard == Shard::kRow) return "RowParallelLinear";
  return options_.norm ? "LayerNormColumnParallelLinear" : "ColumnParallelLinear";
}

std::vector<NamedParameter> ParallelLinear::own_parameters() const {
  const bool parallel = parallel_->tp.size() > 1, column = options_.shard == Shard::kColumn;
  const bool sequence = options_.sequence_parallel && parallel;
  const std::string base = adapters_.empty() ? "" : "base_layer.";

  // Key and value rows that neighbouring ranks repeat: the rows after the query rows of the only local block.
  auto with_shared_rows = [&](ParameterTraits traits, const std::vector<bool>& parts) {
    if (options_.fuse != Fuse::kQkv || options_.heads.groups >= parallel_->tp.size()) return traits;
    const auto widths = part_layout(options_, parallel_->tp.size()).widths;
    traits.shared_first_row = parts[0] ? widths[0] : 0;
    traits.shared_rows = (parts[1] ? widths[1] : 0) + (parts[2] ? widths[2] : 0);
    traits.shared_copies = static_cast<int>(parallel_->tp.size() / options_.heads.groups);
    return traits;
  };
  const std::vector<bool> all_parts(part_layout(options_, 1).widths.size(), true);

  std::vector<NamedParameter> result;
  if (layer_norm_weight_.defined()) {
    result.push_back(
        {base + "layer_norm_weight", layer_norm_weight_, {.sum_over_tp = sequence, .no_weight_decay = true}});
  }
  // Rows of the parts that are marked, as the optimizer wants to tell them apart.
  auto parts_of = [&](const std::vector<bool>& parts) {
    const auto layout = part_layout(options_, parallel_->tp.size());
    ParameterTraits::Parts result{.blocks = layout.blocks};
    for (size_t part = 0; part < parts.size() && parts.size() > 1; ++part) {
      if (parts[part]) result.widths.push_back(layout.widths[part]);
    }
    return result;
  };
  ParameterTraits matrix{.tp_split = parallel, .split_columns = !column, .parts = parts_of(all_parts)};
  result.push_back({base + "weight", weight_, with_shared_rows(matrix, all_parts)});
  if (bias_.defined()) {
    ParameterTraits traits{.tp_split = parallel && column, .sum_over_tp = sequence && !column, .no_weight_decay = true};
    result.push_back({base + "bias", bias_, column ? with_shared_rows(traits, all_parts) : traits});
  }
  for (const auto& [name, adapter] : adapters_) {
    ParameterTraits a{.tp_split = parallel && !column, .sum_over_tp = parallel && column, .split_columns = true};
    ParameterTraits b{.tp_split = parallel && column, .sum_over_tp = parallel && !column};
    b.parts = parts_of(adapter.parts);
    if (!b.parts.widths.empty()) a.parts.widths.assign(b.parts.widths.size(), adapter.r);
    result.push_back({"lora_A." + name + ".weight", adapter.a, a});
    result.push_back({"lora_B." + name + ".weight", adapter.b, column ? with_shared_rows(b, adapter.parts) : b});
  }
  return result;
}

at::Tensor ParallelLinear::forward(const at::Tensor& x_sbh) {
  const auto& tp = parallel_->tp;
  auto x = x_sbh;
  if (layer_norm_weight_.defined())
    x = rms_norm(x, layer_norm_weight_, options_.norm_epsilon, options_.norm_zero_centered);
  ActivationOffload::keep(x_sbh);
  ActivationOffload::keep(x);
  if (options_.shard == Shard::kColumn) {
    at::Tensor y;
    if (sharded()) {
      y = gathered_linear(x, weight_, bias_, tp, options_.overlap);
    } else {
      x = copy_to_region(x, tp);
      y = linear_map(x, weight_, bias_);
    }
    for (const auto& [name, adapter] : adapters_) y = y + adapter_output(adapter, x);
    return y;
  }
  // Both the base product and the adapter's are linear in x, so one reduction behind serves their sum.
  at::Tensor y, sum;
  for (const auto& [name, adapter] : adapters_) {
    const auto output = adapter_output(adapter, x);
    sum = sum.defined() ? sum + output : output;
  }
  if (sharded()) {
    y = scattered_linear(x, weight_, sum, tp, options_.overlap);
  } else {
    y = linear_map(x, weight_);
    y = reduce_from_region(sum.defined() ? y + sum : y, tp);
  }
  return bias_.defined() ? y + bias_ : y;
}

at::Tensor ParallelLinear::adapter_output(const LoraAdapter& adapter, const at::Tensor& x) const {
  auto input = x;
  if (adapter.dropout > 0 && training()) {
    // Only a column-parallel layer without sequence parallelism sees the same x on all tensor ranks.
    const bool alike = options_.shard == Shard::kColumn && !sharded();
    const RandomScope scope(alike ? RandomStream::kReplicated : RandomStream::kSplit, *parallel_, x.device());
    input = at::dropout(x, adapter.dropout, true);
  }
  auto low = linear_map(input, adapter.a) * adapter.scaling;  // [s, b, adapted parts * r]
  // A shard's few columns are gathered, not its input again.
  if (options_.shard == Shard::kColumn && sharded()) low = gather_sequence(low, parallel_->tp);
  auto rows = split_parts(adapter.b, adapter.parts);
  std::vector<at::Tensor> outputs(rows.size());
  int64_t block = 0;
  for (size_t part = 0; part < rows.size(); ++part) {
    if (adapter.parts[part]) outputs[part] = linear_map(low.narrow(-1, adapter.r * block++, adapter.r), rows[part]);
  }
  return join_parts(std::move(outputs), low);
}

std::vector<at::Tensor> ParallelLinear::split_parts(const at::Tensor& rows, const std::vector<bool>& parts) const {
  const auto layout = part_layout(options_, parallel_->tp.size());
  if (layout.widths.size() == 1) return {rows};
  const auto blocks = rows.view({layout.blocks, -1, rows.size(-1)});
  std::vector<at::Tensor> result(parts.size());
  int64_t first = 0;
  for (size_t part = 0; part < parts.size(); ++part) {
    if (!parts[part]) continue;
    result[part] = blocks.narrow(1, first, layout.widths[part]).reshape({-1, rows.size(-1)});
    first += layout.widths[part];
  }
  return result;
}

at::Tensor ParallelLinear::join_parts(std::vector<at::Tensor> outputs, const at::Tensor& like) const {
  const auto layout = part_layout(options_, parallel_->tp.size());
  if (layout.widths.size() == 1) return outputs[0];
  auto sizes = like.sizes().vec();
  sizes.back() = layout.blocks;
  sizes.push_back(0);
  for (size_t part = 0; part < outputs.size(); ++part) {
    sizes.back() = layout.widths[part];
    outputs[part] = outputs[part].defined() ? outputs[part].view(sizes) : at::zeros({}, like.options()).expand(sizes);
  }
  return at::cat(outputs, -1).flatten(-2);
}

void ParallelLinear::add_adapter(const std::string& name, std::vector<bool> parts, int64_t r, double scaling,
                                 double dropout) {
  const auto layout = part_layout(options_, parallel_->tp.size());
  MCB_CHECK(!adapters_.contains(name), "add_lora: adapter '", name, "' is there already");
  TORCH_INTERNAL_ASSERT(parts.size() == layout.widths.size());
  int64_t rows = 0, count = 0;
  for (size_t part = 0; part < parts.size(); ++part) {
    if (!parts[part]) continue;
    rows += layout.blocks * layout.widths[part];
    ++count;
  }
  MCB_CHECK(count > 0, "add_lora: no part of the layer is adapted");
  adapters_[name] = {.a = at::empty({count * r, weight_.size(1)}, weight_.options()).requires_grad_(true),
                     .b = at::zeros({rows, r}, weight_.options()).requires_grad_(true),
                     .parts = std::move(parts),
                     .r = r,
                     .scaling = scaling,
                     .dropout = dropout};
}

at::Tensor ParallelLinear::merged_weight(const std::string& name) const {
  at::NoGradGuard no_grad;
  const auto found = adapters_.find(name);
  if (found == adapters_.end()) return weight_.detach().clone();
  const auto& adapter = found->second;
  auto rows = split_parts(adapter.b.to(at::kFloat), adapter.parts);
  const auto a = adapter.a.to(at::kFloat);
  std::vector<at::Tensor> deltas(rows.size());
  int64_t block = 0;
  for (size_t part = 0; part < rows.size(); ++part) {
    // Transposed, so that parts join along the last dim as outputs do.
    if (adapter.parts[part])
      deltas[part] = at::matmul(a.narrow(0, adapter.r * block++, adapter.r).t(), rows[part].t()).contiguous();
  }
  const auto like = at::empty({weight_.size(1), 1}, a.options());
  const auto delta = join_parts(std::move(deltas), like).t();
  return (weight_.to(at::kFloat) + delta * adapter.scaling).to(weight_.scalar_type());
}

}  // namespace mcore_bridge
