#include "layers/rope.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "config/rope_scaling.h"

namespace mcore_bridge {

RotaryEmbedding::RotaryEmbedding(const ModelConfig& config, c10::Device device)
    : config_(config), device_(device), depends_on_length_(rope_depends_on_length(config)) {
  refresh(config.max_position_embeddings.value_or(0));
}

void RotaryEmbedding::refresh(int64_t length) {
  const auto frequencies = rope_frequencies(config_, length);
  inverse_frequencies_ = at::tensor(at::ArrayRef<float>(frequencies.inv_freq), at::kFloat).to(device_);
  attention_scaling_ = frequencies.attention_scaling;
  length_ = length;
}

RopeTable RotaryEmbedding::table(const at::Tensor& position_ids, int64_t length) {
  if (depends_on_length_ && length != length_) refresh(length);
  const auto angles =
      (position_ids.t().to(at::kFloat).unsqueeze(-1) * inverse_frequencies_).unsqueeze(2);  // [s, b, 1, d/2]
  auto cos = angles.cos(), sin = angles.sin();
  if (attention_scaling_ != 1) {
    cos = cos * attention_scaling_;
    sin = sin * attention_scaling_;
  }
  return {cos.to(config_.params_dtype), sin.to(config_.params_dtype)};
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool interleaved, bool inverse) {
  const auto half = cos.size(-1), rotated = 2 * half;
  auto out = at::empty(x.sizes(), x.options());
  auto halves = [&](const at::Tensor& t) {
    return interleaved ? std::pair{t.slice(-1, 0, rotated, 2), t.slice(-1, 1, rotated, 2)}
                       : std::pair{t.narrow(-1, 0, half), t.narrow(-1, half, half)};
  };
  const auto [x1, x2] = halves(x);
  auto [y1, y2] = halves(out);
  at::mul_out(y1, x1, cos);
  at::mul_out(y2, x2, cos);
  const double sign = inverse ? -1 : 1;  // the inverse rotation is the transpose, which is its gradient
  y1.addcmul_(x2, sin, -sign);
  y2.addcmul_(x1, sin, sign);
  if (rotated < x.size(-1))
    out.narrow(-1, rotated, x.size(-1) - rotated).copy_(x.narrow(-1, rotated, x.size(-1) - rotated));
  return out;
}

struct Rope : torch::autograd::Function<Rope> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                            bool interleaved) {
    context->save_for_backward({cos, sin});
    context->saved_data["interleaved"] = interleaved;
    return rotate(x, cos, sin, interleaved, false);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    return {rotate(grads[0], saved[0], saved[1], context->saved_data["interleaved"].toBool(), true), Variable(),
            Variable(), Variable()};
  }
};

}  // namespace

at::Tensor apply_rope(const at::Tensor& x_sbnd, const RopeTable& table, bool interleaved) {
  return Rope::apply(x_sbnd, table.cos, table.sin, interleaved);
}

}  // namespace mcore_bridge
