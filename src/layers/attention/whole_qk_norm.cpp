#include "layers/attention/whole_qk_norm.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct OptionsHolder : torch::CustomClassHolder {
  explicit OptionsHolder(WholeQkNormOptions o) : options(std::move(o)) {}
  WholeQkNormOptions options;
};

/// Queries [s, b, g, p, d], keys and values [s, b, g, 1, d] as views of a fused row.
struct Views {
  at::Tensor q, k, v;
  Views(const at::Tensor& mixed, const HeadLayout& heads) {
    const auto p = heads.heads / heads.groups;
    const auto grouped = mixed.view({mixed.size(0), mixed.size(1), heads.groups, p + 2, heads.head_dim});
    q = grouped.narrow(3, 0, p);
    k = grouped.narrow(3, p, 1);
    v = grouped.narrow(3, p + 1, 1);
  }
};

at::Tensor over_heads(const at::Tensor& x) { return x.sum(at::IntArrayRef{2, 3, 4}); }  // [s, b]

/// [g * p * d] -> [g, p, d], in the sums' precision, with the 1 of zero-centred norms.
at::Tensor factors(const at::Tensor& weight, const at::Tensor& like, const RmsNormOptions& norm, at::ScalarType type) {
  const auto result = weight.view({like.size(2), like.size(3), like.size(4)}).to(type);
  return norm.zero_centered ? result + 1 : result;
}

at::Tensor by_token(const at::Tensor& x_sb) { return x_sb.view({x_sb.size(0), x_sb.size(1), 1, 1, 1}); }

struct WholeQkNorm : torch::autograd::Function<WholeQkNorm> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& mixed, const at::Tensor& q_weight,
                            const at::Tensor& k_weight, const WholeQkNormOptions* options) {
    const auto& o = *options;
    const auto type = mixed.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const Views in(mixed, o.local);
    auto squares = at::stack(
        {over_heads(in.q.to(type).square()), over_heads(in.k.to(type).square()) / static_cast<double>(o.copies())});
    o.tp.all_reduce(squares);
    const auto d = static_cast<double>(o.local.head_dim);
    squares[0].div_(static_cast<double>(o.heads) * d);
    squares[1].div_(static_cast<double>(o.groups) * d);
    const auto rstd = (squares + o.norm.epsilon).rsqrt_();
    const auto result = at::empty_like(mixed);
    const Views out(result, o.local);
    out.q.copy_((in.q.to(type) * by_token(rstd[0])).mul_(factors(q_weight, in.q, o.norm, type)));
    out.k.copy_((in.k.to(type) * by_token(rstd[1])).mul_(factors(k_weight, in.k, o.norm, type)));
    out.v.copy_(in.v);
    context->saved_data["options"] = at::IValue::make_capsule(c10::make_intrusive<OptionsHolder>(o));
    context->save_for_backward({mixed, q_weight, k_weight, rstd});
    return result;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto capsule = context->saved_data["options"].toCapsule();
    const auto& o = static_cast<const OptionsHolder*>(capsule.get())->options;
    const auto saved = context->get_saved_variables();
    const auto &mixed = saved[0], &rstd = saved[3];
    const auto type = rstd.scalar_type();
    const auto grad_mixed = grads[0].contiguous();
    const Views in(mixed, o.local), grad(grad_mixed, o.local);
    const auto q_hat = in.q.to(type) * by_token(rstd[0]), k_hat = in.k.to(type) * by_token(rstd[1]);
    const auto gq = grad.q.to(type), gk = grad.k.to(type);
    const auto wq = gq * factors(saved[1], in.q, o.norm, type), wk = gk * factors(saved[2], in.k, o.norm, type);
    // Each rank's share of a key head's gradient adds up over its copies, so the sums need no division here ...
    auto dots = at::stack({over_heads(wq * q_hat), over_heads(wk * k_hat)});
    o.tp.all_reduce(dots);
    const auto d = static_cast<double>(o.local.head_dim);
    dots[0].div_(static_cast<double>(o.heads) * d);
    // ... but what goes back to every copy is counted that many times.
    dots[1].div_(static_cast<double>(o.groups) * d * static_cast<double>(o.copies()));
    const auto result = at::empty_like(mixed);
    const Views out(result, o.local);
    out.q.copy_((wq - q_hat * by_token(dots[0])).mul_(by_token(rstd[0])));
    out.k.copy_((wk - k_hat * by_token(dots[1])).mul_(by_token(rstd[1])));
    out.v.copy_(grad.v);
    auto weight_gradient = [&](size_t index, const at::Tensor& g, const at::Tensor& hat) {
      if (!context->needs_input_grad(index)) return Variable();
      return (g * hat).sum(at::IntArrayRef{0, 1}).view(saved[index].sizes()).to(saved[index].scalar_type());
    };
    return {result, weight_gradient(1, gq, q_hat), weight_gradient(2, gk, k_hat), Variable()};
  }
};

}  // namespace

int64_t WholeQkNormOptions::copies() const { return std::max<int64_t>(1, tp.size() * local.groups / groups); }

at::Tensor whole_qk_norm(const at::Tensor& mixed, const at::Tensor& q_weight, const at::Tensor& k_weight,
                         const WholeQkNormOptions& options) {
  return WholeQkNorm::apply(mixed, q_weight, k_weight, &options);
}

}  // namespace mcore_bridge
