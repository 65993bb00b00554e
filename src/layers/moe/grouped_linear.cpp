#include "layers/moe/grouped_linear.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "layers/given.h"
#include "layers/main_gradient.h"
#include "layers/weight_gradients.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

bool aligned(const at::Tensor& x) { return x.size(-1) * x.element_size() % 16 == 0; }

/// libtorch's grouped GEMM wants half precision and rows of a multiple of 16 bytes.
bool on_grouped_gemm(const at::Tensor& x, const at::Tensor& other) {
  const bool half = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
  return x.is_cuda() && half && aligned(x) && aligned(other);
}

/// The host's cumulative ends; a GPU without grouped GEMM for this dtype has to ask the device.
std::vector<int64_t> host_ends(const ExpertRows& groups) {
  if (!groups.host.empty()) return groups.host;
  const auto ends = groups.ends.to(at::kCPU).to(at::kLong).contiguous();
  return {ends.const_data_ptr<int64_t>(), ends.const_data_ptr<int64_t>() + ends.numel()};
}

/// f(expert, first row, rows) for every expert that has rows.
template <class F>
void for_each_group(const ExpertRows& groups, F f) {
  int64_t first = 0, expert = 0;
  for (const auto end : host_ends(groups)) {
    if (end > first) f(expert, first, end - first);
    first = end;
    ++expert;
  }
}

/// Rows that belong to nobody become zeros: grouped GEMM leaves them as they were.
void clear_tail(at::Tensor& y, const ExpertRows& groups) {
  if (!groups.tail) return;
  const auto rows = at::arange(y.size(0), groups.ends.options());
  y.masked_fill_(rows.ge(groups.ends.select(0, -1)).unsqueeze(1), 0);
}

at::Tensor product(const at::Tensor& x, const at::Tensor& matrices /* [E, in, out] */, const at::Tensor& bias,
                   const ExpertRows& groups) {
  if (x.size(0) > 0 && on_grouped_gemm(x, matrices)) {
    auto y = at::_grouped_mm(x, matrices, groups.ends);
    if (bias.defined()) {
      const auto row = at::arange(x.size(0), groups.ends.options());
      const auto expert = at::bucketize(row, groups.ends, /*out_int32=*/false, /*right=*/true);
      y.add_(bias.index_select(0, expert.clamp_max(bias.size(0) - 1)));
    }
    clear_tail(y, groups);
    return y;
  }
  auto y = groups.tail ? at::zeros({x.size(0), matrices.size(2)}, x.options())
                       : at::empty({x.size(0), matrices.size(2)}, x.options());
  for_each_group(groups, [&](int64_t expert, int64_t first, int64_t rows) {
    auto out = y.narrow(0, first, rows);
    if (bias.defined()) {
      at::addmm_out(out, bias[expert], x.narrow(0, first, rows), matrices[expert]);
    } else {
      at::mm_out(out, x.narrow(0, first, rows), matrices[expert]);
    }
  });
  return y;
}

at::Tensor weight_gradient(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                           const ExpertRows& groups) {
  if (x.size(0) > 0 && on_grouped_gemm(grad, x)) return at::_grouped_mm(grad.t(), x, groups.ends);
  auto result = at::zeros_like(weight);
  for_each_group(groups, [&](int64_t expert, int64_t first, int64_t rows) {
    auto out = result[expert];
    at::mm_out(out, grad.narrow(0, first, rows).t(), x.narrow(0, first, rows));
  });
  return result;
}

at::Tensor bias_gradient(const at::Tensor& grad, const at::Tensor& bias, const ExpertRows& groups) {
  if (grad.size(0) > 0 && on_grouped_gemm(grad, grad)) {
    // A product with ones: sums of rows without atomics. Eight columns are the fewest it takes.
    return at::_grouped_mm(grad.t(), at::ones({grad.size(0), 8}, grad.options()), groups.ends).select(2, 0);
  }
  auto result = at::zeros_like(bias);
  for_each_group(groups, [&](int64_t expert, int64_t first, int64_t rows) {
    auto out = result[expert];
    at::sum_out(out, grad.narrow(0, first, rows), 0);
  });
  return result;
}

/// Where training keeps the weight's gradient, as the autograd context holds it.
struct MainHolder : torch::CustomClassHolder {
  explicit MainHolder(std::shared_ptr<MainGradient> m) : main(std::move(m)) {}
  std::shared_ptr<MainGradient> main;
};

struct GroupedLinear : torch::autograd::Function<GroupedLinear> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const at::Tensor& ends, std::vector<int64_t> host,
                            bool tail, bool adds_bias) {
    // Frozen matrices need no rows.
    context->save_for_backward({weight.requires_grad() ? x : at::Tensor(), weight, ends, bias.value_or(at::Tensor())});
    context->saved_data["host"] = host;
    context->saved_data["tail"] = tail;
    context->saved_data["adds_bias"] = adds_bias;
    if (auto main = main_gradient(weight))
      context->saved_data["main"] = at::IValue::make_capsule(c10::make_intrusive<MainHolder>(std::move(main)));
    return product(x, weight.transpose(1, 2), adds_bias ? bias.value_or(at::Tensor()) : at::Tensor(),
                   {ends, host, tail});
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1], &bias = saved[3];
    const ExpertRows groups{saved[2], context->saved_data["host"].toIntVector(), context->saved_data["tail"].toBool()};
    const auto grad = grads[0].contiguous();
    variable_list result(7);
    if (context->needs_input_grad(0)) result[0] = product(grad, weight, {}, groups);
    if (context->needs_input_grad(1)) {
      auto gradient = [=] { return weight_gradient(grad, x, weight, groups); };
      const auto holder = context->saved_data.find("main");
      if (holder == context->saved_data.end() || WeightGradients::current()) {
        result[1] = WeightGradients::now_or_later(weight, gradient);
      } else {
        const auto capsule = holder->second.toCapsule();
        const auto main = static_cast<const MainHolder*>(capsule.get())->main;
        contribute(*main, [=](const at::Tensor&, bool accumulate) { settle(*main, gradient(), accumulate); });
      }
    }
    if (bias.defined() && context->needs_input_grad(2)) {
      const bool adds = context->saved_data["adds_bias"].toBool();
      result[2] = WeightGradients::now_or_later(
          bias, [=] { return adds ? bias_gradient(grad, bias, groups) : at::zeros_like(bias); });
    }
    return result;
  }
};

}  // namespace

ExpertRows expert_rows(const at::Tensor& counts, bool tail) {
  ExpertRows groups{counts.cumsum(0).to(at::kInt), {}, tail};
  if (counts.is_cpu()) groups.host = host_ends(groups);
  return groups;
}

at::Tensor grouped_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                          const ExpertRows& groups, bool adds_bias) {
  MCB_CHECK(x.dim() == 2 && weight.dim() == 3 && x.size(1) == weight.size(2), "grouped_linear: ", x.sizes(),
            " rows and ", weight.sizes(), " matrices do not fit");
  return GroupedLinear::apply(x, weight, given(bias), groups.ends, groups.host, groups.tail, adds_bias);
}

}  // namespace mcore_bridge
