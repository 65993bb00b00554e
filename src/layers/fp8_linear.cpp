#include "layers/fp8_linear.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <atomic>

#include "layers/weight_gradients.h"

namespace mcore_bridge {
namespace {

struct Writes {
  std::atomic<uint64_t> all{0}, trained{0};
};
Writes& writes() {
  static Writes instance;
  return instance;
}

}  // namespace

void note_weights_written(bool frozen) { ++(frozen ? writes().all : writes().trained); }

at::Tensor Fp8Linear::reference(const at::Tensor& x, Slot slot, bool split) {
  const auto amax = at::zeros({1}, x.options().dtype(at::kFloat));
  fp8_raise_amax(x, amax);
  if (split) {
    auto whole = amax;
    options_.tp.all_reduce_max(whole);
  }
  if (options_.recipe == Fp8Recipe::kDelayed && training_) {
    auto next = options_.history->next(options_.first_slot + slot);
    at::maximum_out(next, next, amax);
  }
  return amax;
}

Fp8Pair Fp8Linear::quantize(const at::Tensor& x, Slot slot, bool split, Fp8Quantization how, at::Tensor* scaled_for) {
  how.format = slot == kGradient && options_.hybrid ? at::kFloat8_e5m2 : at::kFloat8_e4m3fn;
  how.scaling = scaling();
  if (how.scaling != Fp8Scaling::kTensor) {
    if (slot == kWeight) how.scaling = Fp8Scaling::kBlocks;
  } else if (options_.recipe == Fp8Recipe::kDelayed && options_.history->known() &&
             (slot != kWeight || x.requires_grad())) {  // what never changes has no use for a history
    how.reference = options_.history->reference(options_.first_slot + slot);
    if (training_) how.amax = options_.history->next(options_.first_slot + slot);
  } else {
    how.reference = reference(x, slot, split && options_.tp.size() > 1);
  }
  if (scaled_for) *scaled_for = how.reference;
  return fp8_quantize(x, how);
}

Fp8Matrix Fp8Linear::stored(const at::Tensor& codes) const {
  return {codes.detach(), stored_scale_,
          options_.recipe == Fp8Recipe::kBlockwise ? Fp8Scaling::kBlocks : Fp8Scaling::kTensor};
}

void Fp8Linear::store_weight(const at::Tensor& codes) {
  const auto options = codes.options().dtype(at::kFloat).requires_grad(false);
  const bool blocks = options_.recipe == Fp8Recipe::kBlockwise;
  stored_scale_ =
      blocks ? at::ones({codes.size(0) / 128, (codes.size(1) / 128 + 3) / 4 * 4}, options) : at::ones({1}, options);
}

void Fp8Linear::quantize_weight(const at::Tensor& values, const at::Tensor& codes) {
  const at::NoGradGuard no_grad;
  const auto made = quantize(values.detach(), kWeight, true, {}).straight;
  codes.detach().copy_(made.values);
  if (stored_scale_.dim() == 1) {
    stored_scale_.copy_(made.scale);
  } else {  // what is beyond the blocks stays as it is, so that equal weights are equal buffers
    const auto blocks = codes.size(1) / 128;
    stored_scale_.narrow(1, 0, blocks).copy_(made.scale.narrow(1, 0, blocks));
  }
}

at::Tensor Fp8Linear::weight_values(const at::Tensor& codes) const {
  const at::NoGradGuard no_grad;
  return fp8_dequantize(stored(codes));
}

int64_t Fp8Linear::weight_bytes(int64_t elements) const {
  return stores_weight() ? static_cast<int64_t>(stored_scale_.nbytes()) : 2 * elements;
}

Fp8Matrix Fp8Linear::weight(const at::Tensor& weight, bool turned) {
  if (stores_weight()) return turned ? fp8_turned(stored(weight)) : stored(weight);
  if (!keep_) {
    weight_ = {};
    const auto made = quantize(weight, kWeight, true, {.straight = !turned, .turned = turned});
    return turned ? made.turned : made.straight;
  }
  const auto& counts = writes();
  const Stamp now{weight.const_data_ptr(), static_cast<uint64_t>(weight._version()),
                  counts.all + (weight.requires_grad() ? counts.trained.load() : 0)};
  if (!weight_.straight.defined() || !(now == stamp_)) {
    weight_ = {};  // its memory first
    weight_ = quantize(weight, kWeight, true, {.straight = true, .turned = true});
    stamp_ = now;
  }
  return turned ? weight_.turned : weight_.straight;
}

at::Tensor Fp8Linear::product(const at::Tensor& x, int64_t columns) const {
  return fp8_product(x.size(0), columns, scaling(), x.options());
}

at::Tensor Fp8Linear::forward(const at::Tensor& x, const at::Tensor& w, const at::Tensor& addend, at::Tensor* amax) {
  const at::NoGradGuard no_grad;
  const auto quantised = quantize(x, kInput, !options_.column, {}, amax);
  return fp8_matmul(quantised.straight, weight(w, false), x.size(0), x.scalar_type(), addend);
}

Fp8Pair Fp8Linear::gradient(const at::Tensor& dy, bool straight, bool turned) {
  const at::NoGradGuard no_grad;
  return quantize(dy, kGradient, options_.column, {.straight = straight, .turned = turned});
}

at::Tensor Fp8Linear::input_gradient(const Fp8Matrix& dy, int64_t rows, at::ScalarType dtype, const at::Tensor& w,
                                     const at::Tensor& addend) {
  const at::NoGradGuard no_grad;
  return fp8_matmul(dy, weight(w, true), rows, dtype, addend);
}

Fp8Matrix Fp8Linear::turned_input(const at::Tensor& x, const at::Tensor& amax) {
  const at::NoGradGuard no_grad;
  return fp8_quantize(x, {.scaling = scaling(), .straight = false, .turned = true, .reference = amax}).turned;
}

at::Tensor fp8_weight_gradient(const at::Tensor& weight, const std::shared_ptr<MainGradient>& main, const Fp8Matrix& dy,
                               const Fp8Matrix& x) {
  if (main) {
    return WeightGradients::now_or_later(
        weight, main, [dy, x](const at::Tensor& grad, bool accumulate) { fp8_accumulate(grad, dy, x, accumulate); });
  }
  return WeightGradients::now_or_later(weight, [dy, x, dtype = weight.scalar_type(), out = weight.size(0)] {
    return fp8_matmul(dy, x, out, dtype, {});
  });
}

}  // namespace mcore_bridge
