// The operations of src/kernels for tests and benchmarks; nothing in the package uses them from Python.
#include <ATen/ops/zeros.h>

#include "bindings/bindings.h"
#include "kernels/adamw.h"
#include "kernels/cross_entropy.h"
#include "kernels/cuda/launch.h"
#include "kernels/fp8.h"
#include "kernels/fp8_parts.h"
#include "kernels/gated_activation.h"
#include "kernels/lora_b.h"
#include "kernels/param_remainder.h"
#include "kernels/permute_rows.h"
#include "kernels/rms_norm.h"
#include "kernels/split_qkv.h"
#include "kernels/squared_norm.h"
#include "layers/activation.h"
#include "layers/attention/core_attention.h"
#include "layers/linear_function.h"
#include "layers/moe/router_logits.h"
#include "parallel/parallel_state.h"

namespace mcore_bridge {
namespace {

using OptTensor = std::optional<at::Tensor>;

at::Tensor or_undefined(const OptTensor& tensor) { return tensor.value_or(at::Tensor()); }

OptTensor or_none(const at::Tensor& tensor) { return tensor.defined() ? OptTensor(tensor) : std::nullopt; }

SplitQkvOptions split_options(int64_t groups, int64_t per_group, int64_t d, const OptTensor& cos, const OptTensor& sin,
                              bool interleaved, const OptTensor& q_weight, const OptTensor& k_weight, double epsilon) {
  return {.groups = groups,
          .per_group = per_group,
          .d = d,
          .cos = or_undefined(cos),
          .sin = or_undefined(sin),
          .interleaved = interleaved,
          .q_weight = or_undefined(q_weight),
          .k_weight = or_undefined(k_weight),
          .norm = {.epsilon = epsilon}};
}

/// A micro-batch's packed row.
struct PackedRow {
  PackedRow(const at::Tensor& cu_seqlens, bool cudnn) {
    const auto host = cu_seqlens.cpu().to(at::kLong);
    packed.cu_seqlens = cu_seqlens;
    packed.cu_seqlens_host.assign(host.data_ptr<int64_t>(), host.data_ptr<int64_t>() + host.numel());
    packed.max_seqlen = host.diff().max().item<int64_t>();
    if (cudnn && cudnn_attention_here(cu_seqlens.device()))
      rows = std::make_shared<RaggedRows>(packed, packed.cu_seqlens_host.back());
  }
  PackedSeqParams packed;
  std::shared_ptr<RaggedRows> rows;
};

/// As Python sees it: (values, scale), the scaling's name beside.
using Fp8Tensors = std::pair<at::Tensor, at::Tensor>;

Fp8Scaling parse_scaling(const std::string& name) {
  return name == "rows" ? Fp8Scaling::kRows : name == "blocks" ? Fp8Scaling::kBlocks : Fp8Scaling::kTensor;
}

Fp8Matrix fp8_matrix(const Fp8Tensors& tensors, const std::string& scaling) {
  return {tensors.first, tensors.second, parse_scaling(scaling)};
}

void init_permute(py::module_& kernels) {
  py::class_<Permutation>(kernels, "Permutation")
      .def(py::init([](const at::Tensor& order, const at::Tensor& inverse, int64_t topk, bool padded) {
             return Permutation{order, inverse, topk, padded};
           }),
           "order [n], inverse [t * k], k, whether rows or places may be without the other");
  kernels.def("spread_rows", [](const at::Tensor& x, const OptTensor& weights, const Permutation& permutation) {
    return spread_rows(x, or_undefined(weights), permutation);
  });
  kernels.def("combine_rows", [](const at::Tensor& rows, const OptTensor& weights, const Permutation& permutation) {
    return combine_rows(rows, or_undefined(weights), permutation);
  });
  kernels.def("combine_rows_backward", [](const at::Tensor& grad, const at::Tensor& rows, const at::Tensor& weights,
                                          const Permutation& permutation) {
    const auto back = combine_rows_backward(grad, rows, weights, permutation, true, true);
    return std::pair{back.rows, back.weights};
  });
}

void init_fp8(py::module_& kernels) {
  kernels.def("fp8_quantize", [](const at::Tensor& x, const std::string& scaling, bool e5m2, bool straight, bool turned,
                                 const OptTensor& reference, const OptTensor& amax) {
    const auto pair = fp8_quantize(x, {.scaling = parse_scaling(scaling),
                                       .format = e5m2 ? at::kFloat8_e5m2 : at::kFloat8_e4m3fn,
                                       .straight = straight,
                                       .turned = turned,
                                       .reference = or_undefined(reference),
                                       .amax = or_undefined(amax)});
    return std::tuple{or_none(pair.straight.values), or_none(pair.straight.scale), or_none(pair.turned.values),
                      or_none(pair.turned.scale)};
  });
  kernels.def("fp8_raise_amax", py::overload_cast<const at::Tensor&, const at::Tensor&>(&fp8_raise_amax));
  kernels.def(
      "fp8_parts",
      [](const at::Tensor& values, const std::vector<int64_t>& cuts, const at::Tensor& scale, const at::Tensor& like) {
        const auto codes = at::zeros(values.sizes(), values.options().dtype(at::kFloat8_e4m3fn));
        const auto amax = at::zeros({scale.numel()}, scale.options());
        std::vector<Fp8Part> parts;
        for (size_t i = 0; i < cuts.size(); ++i) {
          const auto begin = cuts[i], length = (i + 1 < cuts.size() ? cuts[i + 1] : values.numel()) - begin;
          parts.push_back({values.view({-1}).narrow(0, begin, length), codes.view({-1}).narrow(0, begin, length), begin,
                           values.size(1), 0, scale.dim() == 1 ? 0 : scale.size(1)});
        }
        fp8_raise_amax(parts, amax, like.scalar_type());
        fp8_write_scales({{scale, 0}}, amax);
        fp8_quantize(parts, amax, like.scalar_type());
        return codes;
      },
      "Codes of a float matrix cut at these elements, rounded to like's dtype first; the scales are filled.");
  kernels.def("fp8_turned", [](const Fp8Tensors& matrix, const std::string& scaling) {
    const auto turned = fp8_turned(fp8_matrix(matrix, scaling));
    return std::pair{turned.values, turned.scale};
  });
  kernels.def("fp8_dequantize", [](const Fp8Tensors& matrix, const std::string& scaling) {
    return fp8_dequantize(fp8_matrix(matrix, scaling));
  });
  kernels.def("fp8_matmul", [](const Fp8Tensors& a, const std::string& scaling_a, const Fp8Tensors& b,
                               const std::string& scaling_b, int64_t rows, const OptTensor& onto,
                               const at::Tensor& like) {
    return fp8_matmul(fp8_matrix(a, scaling_a), fp8_matrix(b, scaling_b), rows, like.scalar_type(), or_undefined(onto));
  });
  kernels.def(
      "fp8_linear",
      [](const at::Tensor& x, const at::Tensor& weight, const at::Tensor& a, const at::Tensor& b, double scaling,
         const std::string& recipe, bool hybrid) {
        const auto group = ParallelState::single()->tp;
        LinearPlan plan{.layout = {1, {weight.size(0)}}, .adapters = {{{true}, scaling, 0}}, .group = group};
        plan.fp8 = std::make_shared<Fp8Linear>(
            Fp8Options{.recipe = recipe == "blockwise" ? Fp8Recipe::kBlockwise : Fp8Recipe::kTensorwise,
                       .hybrid = hybrid,
                       .tp = group});
        return linear(plan, {.x_sbh = x, .weight = weight, .a = {a}, .b = {b}}).y;
      },
      "A linear layer with an adapter, differentiable; x [s, b, in].");
  kernels.def("fp8_accumulate",
              [](const at::Tensor& sum, const Fp8Tensors& a, const Fp8Tensors& b, const std::string& scaling,
                 bool accumulate) { fp8_accumulate(sum, fp8_matrix(a, scaling), fp8_matrix(b, scaling), accumulate); });
}

}  // namespace

void init_kernels(py::module_& module) {
  auto kernels = module.def_submodule("kernels", "Fused operations, each with a reference in plain ATen.");
  kernels.def("cuda_built", &cuda::built);
  init_fp8(kernels);
  init_permute(kernels);
  kernels.def("squared_norm", &squared_norm);
  kernels.def(
      "router_logits",
      [](const at::Tensor& x, const at::Tensor& weight, const OptTensor& bias) {
        return router_logits(x, weight, or_undefined(bias), at::kFloat);
      },
      "In fp32, differentiable.");
  kernels.def("cudnn_attention_here", [](const std::string& device) { return cudnn_attention_here(device); });
  py::class_<PackedRow>(kernels, "PackedRow")
      .def(py::init<const at::Tensor&, bool>(), "cu_seqlens, whether cuDNN may take it");
  kernels.def(
      "core_attention",
      [](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const PackedRow* row, int64_t window_left) {
        return core_attention(q, k, v, {}, row ? std::optional(row->packed) : std::nullopt, row ? row->rows : nullptr,
                              {.window_left = window_left}, true);
      },
      "Differentiable; q [s, b, n, d], k and v [s, b, groups, d].");
  kernels.def("rms_norm_forward", [](const at::Tensor& x, const OptTensor& delta, const at::Tensor& weight,
                                     double epsilon, bool zero_centered) {
    const auto out = rms_norm_forward(x, or_undefined(delta), weight, {epsilon, zero_centered});
    return std::tuple{out.normed, out.sum, out.rstd};
  });
  kernels.def("rms_norm_apply",
              [](const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, bool zero_centered) {
                return rms_norm_apply(x, rstd, weight, {.zero_centered = zero_centered});
              });
  kernels.def("rms_norm_backward",
              [](const at::Tensor& grad, const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight,
                 const OptTensor& grad_residual, bool zero_centered, bool want_weight, bool want_normed) {
                const auto back = rms_norm_backward(grad, x, rstd, weight, or_undefined(grad_residual),
                                                    {.zero_centered = zero_centered}, want_weight, want_normed);
                return std::tuple{back.x, or_none(back.weight), or_none(back.normed)};
              });
  kernels.def("gated_forward", [](const at::Tensor& x, const std::string& activation) {
    return gated_activation_forward(x, parse_activation(activation));
  });
  kernels.def("gated_backward",
              [](const at::Tensor& grad, const at::Tensor& x, const std::string& activation, bool want_out) {
                const auto back = gated_activation_backward(grad, x, parse_activation(activation), want_out);
                return std::tuple{back.x, or_none(back.out)};
              });
  kernels.def(
      "split_qkv_forward", [](const at::Tensor& mixed, int64_t groups, int64_t per_group, int64_t d,
                              const OptTensor& cos, const OptTensor& sin, bool interleaved, const OptTensor& q_weight,
                              const OptTensor& k_weight, double epsilon, bool view_v) {
        const auto out = split_qkv_forward(
            mixed, split_options(groups, per_group, d, cos, sin, interleaved, q_weight, k_weight, epsilon), view_v);
        return std::tuple{out.q, out.k, out.v};
      });
  kernels.def("split_qkv_backward",
              [](const at::Tensor& grad_q, const at::Tensor& grad_k, const at::Tensor& grad_v, const OptTensor& mixed,
                 int64_t groups, int64_t per_group, int64_t d, const OptTensor& cos, const OptTensor& sin,
                 bool interleaved, const OptTensor& q_weight, const OptTensor& k_weight, double epsilon) {
                const auto back = split_qkv_backward(
                    {grad_q, grad_k, grad_v}, or_undefined(mixed),
                    split_options(groups, per_group, d, cos, sin, interleaved, q_weight, k_weight, epsilon), true);
                return std::tuple{back.mixed, or_none(back.q_weight), or_none(back.k_weight)};
              });
  kernels.def("softmax_statistics",
              [](const at::Tensor& logits, const at::Tensor& labels, int64_t first, int64_t count) {
                const auto out = softmax_statistics(logits, labels, {first, count});
                return std::tuple{out.maximum, out.sum, out.target};
              });
  kernels.def("softmax_gradient_", [](const at::Tensor& logits, const at::Tensor& labels, int64_t first, int64_t count,
                                      const at::Tensor& maximum, const at::Tensor& sum, const at::Tensor& weight) {
    softmax_gradient_(logits, labels, {first, count}, {maximum, sum, maximum}, weight);
  });
  kernels.def("softmax_statistics_and_gradient_",
              [](const at::Tensor& logits, const at::Tensor& labels, int64_t count, const at::Tensor& weight) {
                const auto out = softmax_statistics_and_gradient_(logits, labels, {0, count}, weight);
                return std::tuple{out.maximum, out.sum, out.target};
              });
  kernels.def("expand_b", [](const at::Tensor& b, const std::vector<bool>& parts, int64_t blocks,
                             const std::vector<int64_t>& widths,
                             double scaling) { return expand_b(b, parts, {blocks, widths}, scaling); });
  kernels.def("collect_b", [](const at::Tensor& expanded, const at::Tensor& to, const std::vector<bool>& parts,
                              int64_t blocks, const std::vector<int64_t>& widths, double scaling, bool accumulate) {
    collect_b(expanded, to, parts, {blocks, widths}, scaling, accumulate);
  });
  kernels.def("join_master", &join_master);
  kernels.def("split_master", &split_master);
  kernels.def("fused_adamw", [](std::vector<at::Tensor> masters, std::vector<at::Tensor> grads,
                                std::vector<at::Tensor> exp_avgs, std::vector<at::Tensor> exp_avg_sqs,
                                const std::vector<OptTensor>& parameters, double lr, double beta1, double beta2,
                                double epsilon, double weight_decay, const at::Tensor& grad_scale,
                                const at::Tensor& skip, const at::Tensor& step) {
    AdamWTensors tensors{std::move(masters), std::move(grads), std::move(exp_avgs), std::move(exp_avg_sqs), {}};
    for (const auto& parameter : parameters) tensors.parameters.push_back(or_undefined(parameter));
    fused_adamw(tensors, {lr, beta1, beta2, epsilon, weight_decay}, grad_scale, skip, step);
  });
}

}  // namespace mcore_bridge
