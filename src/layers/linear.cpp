#include "layers/linear.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "kernels/room.h"
#include "layers/activation.h"
#include "layers/main_gradient.h"
#include "layers/norm.h"
#include "layers/offload.h"
#include "layers/sequence_linear.h"
#include "layers/weight_gradients.h"
#include "mcore_bridge/error.h"
#include "parallel/collectives.h"
#include "parallel/random.h"

namespace mcore_bridge {
namespace {

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

}  // namespace

ParallelLinear::ParallelLinear(LinearOptions options, ParallelStatePtr parallel, at::TensorOptions tensor_options)
    : options_(options), parallel_(std::move(parallel)), dtype_(c10::typeMetaToScalarType(tensor_options.dtype())) {
  const auto tp = parallel_->tp.size();
  const auto rows = part_layout(options_, tp).rows();
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
  if (weight_in_fp8()) {
    const auto& scale = fp8_->stored_scale();
    result.push_back({base + "weight_scale_inv", scale, {.tp_split = parallel && scale.dim() > 1, .buffer = true}});
  }
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

LinearOutput ParallelLinear::forward(const at::Tensor& x_sbh, const at::Tensor& delta) {
  const bool norm = layer_norm_weight_.defined();
  if (sharded()) {
    const auto sum = delta.defined() ? x_sbh + delta : x_sbh;
    ActivationOffload::keep(sum);
    return {forward_sharded(norm ? rms_norm(sum, layer_norm_weight_, options_.norm_epsilon, options_.norm_zero_centered)
                                 : sum),
            sum};
  }
  LinearPlan plan;
  if (norm) {
    plan.prologue = LinearPlan::Prologue::kNorm;
    plan.norm = {.epsilon = options_.norm_epsilon, .zero_centered = options_.norm_zero_centered};
  }
  return run(x_sbh, delta, std::move(plan));
}

at::Tensor ParallelLinear::forward_gated(const at::Tensor& x_sbh, const GatedOptions& activation, bool unused) {
  TORCH_INTERNAL_ASSERT(!layer_norm_weight_.defined());
  if (sharded()) return forward_sharded(gated_activation(x_sbh, activation));
  LinearPlan plan;
  plan.prologue = LinearPlan::Prologue::kGated;
  plan.activation = activation;
  plan.unused = unused;
  return run(x_sbh, {}, std::move(plan)).y;
}

RandomStream ParallelLinear::dropout_stream() const {
  const bool alike = options_.shard == Shard::kColumn && !sharded();
  return alike ? RandomStream::kReplicated : RandomStream::kSplit;
}

void ParallelLinear::prepare_fp8() const {
  MCB_CHECK(!fp8_->stores_weight() || !weight_.requires_grad() || !at::GradMode::is_enabled() || main_gradient(weight_),
            "fp8_param: weights that are FP8 codes alone have no .grad, which would be of their type; train with "
            "mcore_bridge.Trainer (train_step), freeze them (add_lora, requires_grad_(False)), or leave out fp8_param "
            "(--fp8_param_gather) and keep fp8");
  fp8_->set_training(training());
}

LinearOutput ParallelLinear::run(const at::Tensor& x, const at::Tensor& delta, LinearPlan plan) const {
  plan.layout = part_layout(options_, parallel_->tp.size());
  plan.column = options_.shard == Shard::kColumn;
  plan.group = parallel_->tp;
  plan.fp8 = fp8_;
  if (fp8_) prepare_fp8();
  LinearTensors tensors{
      .x_sbh = x, .delta = delta, .weight = weight_, .bias = bias_, .norm_weight = layer_norm_weight_};
  bool draws = false;
  for (const auto& [name, adapter] : adapters_) {
    plan.adapters.push_back(
        {.parts = adapter.parts, .scaling = adapter.scaling, .dropout = training() ? adapter.dropout : 0});
    tensors.a.push_back(adapter.a);
    tensors.b.push_back(adapter.b);
    draws = draws || plan.adapters.back().dropout > 0;
  }
  std::optional<RandomScope> scope;
  if (draws) scope.emplace(dropout_stream(), *parallel_, x.device());
  auto output = linear(plan, tensors);
  ActivationOffload::keep(output.sum.defined() ? output.sum : x);
  return output;
}

at::Tensor ParallelLinear::forward_sharded(const at::Tensor& x) const {
  const auto& tp = parallel_->tp;
  if (fp8_) prepare_fp8();
  ActivationOffload::keep(x);
  if (options_.shard == Shard::kColumn) {
    auto y = gathered_linear(x, weight_, bias_, tp, options_.overlap, fp8_);
    for (const auto& [name, adapter] : adapters_) y = y + adapter_output(adapter, x);
    return y;
  }
  // Both the base product and the adapter's are linear in x, so one reduction behind serves their sum.
  at::Tensor sum;
  for (const auto& [name, adapter] : adapters_) {
    const auto output = adapter_output(adapter, x);
    sum = sum.defined() ? sum + output : output;
  }
  const auto y = scattered_linear(x, weight_, sum, tp, options_.overlap, fp8_);
  return bias_.defined() ? y + bias_ : y;
}

at::Tensor ParallelLinear::adapter_output(const LoraAdapter& adapter, const at::Tensor& x) const {
  auto input = x;
  if (adapter.dropout > 0 && training()) {
    const RandomScope scope(dropout_stream(), *parallel_, x.device());
    input = at::dropout(x, adapter.dropout, true);
  }
  auto low = linear_map(input, adapter.a);  // [s, b, adapted parts * r]
  // A shard's few columns are gathered, not its input again.
  if (options_.shard == Shard::kColumn) low = gather_sequence(low, parallel_->tp);
  return linear_map(low,
                    expanded_b(adapter.b, adapter.parts, part_layout(options_, parallel_->tp.size()), adapter.scaling));
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
  const auto like = weight_.options().dtype(dtype_).requires_grad(false);
  adapters_[name] = {.a = at::empty({count * r, weight_.size(1)}, like).requires_grad_(true),
                     .b = at::zeros({rows, r}, like).requires_grad_(true),
                     .parts = std::move(parts),
                     .r = r,
                     .scaling = scaling,
                     .dropout = dropout};
}

int64_t ParallelLinear::room() const {
  if (adapters_.size() != 1 || weight_.requires_grad() || fp8_ || sharded() || !(options_.norm || options_.gated))
    return 0;
  const auto columns = adapters_.begin()->second.a.size(0);
  constexpr int64_t kAccess = 8, kLine = 64;  // 16 bytes of the narrowest dtype, of which 64 are a line of memory
  if (columns % kAccess != 0 || weight_.size(1) % kAccess != 0) return 0;
  return (columns + kLine - 1) / kLine * kLine;
}

void ParallelLinear::make_room() {
  const auto elements = room();
  if (elements == 0 || room_of(weight_) >= elements) return;
  weight_.set_data(moved_to_room(weight_.detach(), elements));
}

void ParallelLinear::set_fp8(const std::string& name, Fp8Options options) {
  const bool blocks = options.recipe == Fp8Recipe::kBlockwise;
  const auto missing = fp8_missing(weight_.device(), blocks);
  MCB_CHECK(missing.empty(), "get_mcore_model: fp8: ", missing);
  const auto multiple = fp8_multiple(blocks ? Fp8Scaling::kRows : Fp8Scaling::kTensor);
  for (const auto dim : {0, 1}) {
    MCB_CHECK(weight_.size(dim) % multiple == 0, "get_mcore_model: fp8: ", name, " has ", weight_.size(dim),
              dim == 0 ? " rows" : " columns", " on this tensor-parallel rank (of ", parallel_->tp.size(),
              "), which must be a multiple of ", multiple,
              blocks ? " with fp8_recipe blockwise; use fewer ranks, or tensorwise or delayed (16)"
                     : "; use fewer ranks, or no fp8");
  }
  options.column = options_.shard == Shard::kColumn;
  options.tp = parallel_->tp;
  fp8_ = std::make_shared<Fp8Linear>(std::move(options));
  if (weight_.scalar_type() == at::kFloat8_e4m3fn) fp8_->store_weight(weight_);
}

void ParallelLinear::store_weight_in_fp8() {
  const auto options = weight_.options().dtype(at::kFloat8_e4m3fn).requires_grad(false);
  const auto sizes = weight_.sizes().vec();
  weight_.reset();  // its memory first
  weight_ = at::zeros(sizes, options).requires_grad_(true);
  wide_.set_exact(weight_);
}

at::Tensor ParallelLinear::weight_values() const {
  if (!weight_in_fp8()) return weight_.detach();
  const auto wide = wide_.values(weight_);
  return wide.defined() ? wide : fp8_->weight_values(weight_).to(dtype_);
}

void ParallelLinear::set_weight_values(const at::Tensor& values) {
  const at::NoGradGuard no_grad;
  if (weight_in_fp8()) {
    const auto given = values.to(weight_.device(), dtype_);
    fp8_->quantize_weight(given, weight_);
    if (weight_.requires_grad()) {
      wide_.keep(given, weight_);
    } else {
      wide_.forget();
    }
  } else {
    weight_.copy_(values);
  }
}

at::Tensor ParallelLinear::merged_weight(const std::string& name) const {
  at::NoGradGuard no_grad;
  const auto found = adapters_.find(name);
  if (found == adapters_.end()) return weight_in_fp8() ? weight_values() : weight_.detach().clone();
  const auto& adapter = found->second;
  const auto layout = part_layout(options_, parallel_->tp.size());
  const auto b = expand_b(adapter.b.to(at::kFloat), adapter.parts, layout, adapter.scaling);
  return at::addmm(weight_values().to(at::kFloat), b, adapter.a.to(at::kFloat)).to(dtype_);
}

Footprint ParallelLinear::footprint(const ActivationShape& shape, bool gated) const {
  const auto tp = parallel_->tp.size();
  const bool split = sharded(), column = options_.shard == Shard::kColumn, norm = layer_norm_weight_.defined();
  const auto tokens = shape.tokens(), local = column && split ? tokens / tp : tokens, e = shape.element;
  const auto in = weight_.size(1), out = weight_.size(0);
  const bool weight_grad = weight_.requires_grad(),
             input_grad = shape.input_grad || (norm && layer_norm_weight_.requires_grad());  // of the product's input
  Footprint result{.output_grad = input_grad || weight_grad || (bias_.defined() && bias_.requires_grad())};
  for (const auto& [name, adapter] : adapters_)
    result.output_grad = result.output_grad || adapter.a.requires_grad() || adapter.b.requires_grad();

  auto product = [&](int64_t rows, const at::Tensor& matrix, bool matrix_grad, bool columns_grad) {
    const auto flops = 2.0 * static_cast<double>(rows) * static_cast<double>(matrix.numel());
    result.forward_flops += flops;
    result.backward_flops += flops * ((columns_grad ? 1 : 0) + (matrix_grad ? 1 : 0));
  };
  product(tokens, weight_, weight_grad, input_grad);
  const bool leaves_out = gated && tp == 1 && !fp8_;
  if (leaves_out) result.unread_flops = result.forward_flops;
  if (weight_grad) result.deferred = tokens * (in + out) * (fp8_ ? 1 : e);
  const auto whole = tokens * (column ? in : out) * e, shard = whole / tp;  // what crosses the group
  if (column && split) {
    result.tensor_forward = options_.overlap ? Traffic::exchange(shard) * (tp - 1) : Traffic::all_gather(whole, tp);
    const bool overlap = options_.overlap && input_grad;
    if (input_grad)
      result.tensor_backward = overlap ? Traffic::exchange(shard) * (tp - 1) : Traffic::reduce_scatter(whole, tp);
    if (weight_grad)  // the input once more
      result.tensor_backward += overlap ? Traffic::exchange(shard) * (tp - 1) : Traffic::all_gather(whole, tp);
  } else if (column) {
    if (input_grad) result.tensor_backward = Traffic::all_reduce(whole, tp);
  } else if (split) {
    result.tensor_forward = options_.overlap ? Traffic::exchange(shard) * (tp - 1) : Traffic::reduce_scatter(whole, tp);
    if (result.output_grad)
      result.tensor_backward =
          options_.overlap && input_grad ? Traffic::exchange(shard) * (tp - 1) : Traffic::all_gather(whole, tp);
  } else {
    result.tensor_forward = Traffic::all_reduce(whole, tp);
  }

  // What stands in front of the product: as one node it is made again from its input, else its result is kept too.
  const bool front = norm || gated;
  const auto width = gated ? 2 * in : in;
  bool reads_input = weight_grad;  // somebody's gradient is a product with the input
  int64_t saved = 0;
  for (const auto& [name, adapter] : adapters_) {
    const auto& [a, b, parts, r, scaling, dropout] = adapter;
    product(local, a, a.requires_grad(), input_grad);
    product(tokens, b, b.requires_grad(), a.requires_grad() || input_grad);
    if (leaves_out) result.unread_flops += 2.0 * static_cast<double>(tokens) * static_cast<double>(b.numel());
    if (a.requires_grad()) result.deferred += (tokens * a.size(0) + (weight_grad ? 0 : tokens * in)) * e;
    saved += tokens * a.size(0) * e;                                                                  // A x
    if (parts.size() > 1 || split) saved += parts.size() == 1 ? b.numel() * e : out * a.size(0) * e;  // B as one matrix
    if (split && dropout > 0) {
      if (input_grad) saved += local * in * (shape.fused ? 1 : e);  // mask
      if (a.requires_grad()) saved += local * in * e;               // what it left
    } else {
      if (dropout > 0) saved += local * in;
      reads_input = reads_input || a.requires_grad();
    }
    if (column && split) {
      result.tensor_forward += Traffic::all_gather(tokens * a.size(0) * e, tp);
      result.tensor_backward += Traffic::reduce_scatter(tokens * a.size(0) * e, tp);
    }
  }
  if (norm && (!split || input_grad)) saved += local * 4;
  int64_t inputs = 0;  // in front of the norm or activation, and behind it
  if (!shape.input_kept && (!split || (front ? input_grad : reads_input))) inputs += local * width * e;
  if (split && front && reads_input) inputs += local * in * e;
  if (result.output_grad) {
    result.saved = saved + inputs;
    result.offloaded = inputs;
  }

  // Gradients of output and input, the input made again; on the CPU the fp32 copies from which the weight's is added
  // up. Gated, when these are gone: the activation's gradient, twice as wide, and on the CPU its steps.
  const auto copies = !shape.fused && e < 4 && weight_grad ? (out + in) * 4 : 0;
  const auto product_bytes = (gated ? 2 : 3) * in * e + copies, steps = gated ? (shape.fused ? 4 : 6) * in * e : 0;
  result.workspace = tokens * (out * e + std::max(product_bytes, steps));
  if (fp8_) {
    const bool turned = weight_grad;  // both matrices once more, for the weight's gradient
    result.workspace += tokens * (out + (turned ? out + in : 0));
    if (fp8_->stores_weight() && input_grad) result.workspace += in * out;  // the codes turned round
  }
  return result;
}

}  // namespace mcore_bridge
