// The three products of a linear layer in FP8: y = x W^T, dx = dy W, dW = dy^T x. Inputs and results are of the
// layer's own dtype; what is quantised, and with which scale, is decided here.
//
// Recipes, as in Megatron and Transformer Engine. tensorwise: one scale a tensor from its own largest magnitude.
// delayed: from those of the steps before (tensorwise until there is one). blockwise: 128 numbers along the summed
// dimension for activations and gradients, 128 x 128 for weights, as the published checkpoints have them. Scales of a
// tensor that is split over the tensor-parallel ranks are those of the whole one.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "kernels/fp8.h"
#include "layers/amax_history.h"
#include "layers/main_gradient.h"
#include "parallel/group.h"

namespace mcore_bridge {

enum class Fp8Recipe { kTensorwise, kDelayed, kBlockwise };

struct Fp8Options {
  Fp8Recipe recipe = Fp8Recipe::kTensorwise;
  bool hybrid = true;  ///< gradients are e5m2 instead of e4m3
  bool column = true;  ///< W's rows are split over the ranks of `tp`; else its columns
  Group tp;
  std::shared_ptr<AmaxHistory> history;  ///< kDelayed
  int64_t first_slot = 0;                ///< of the layer's three
};

/// Tells that weights were written otherwise than by an operation autograd counts: `frozen` too, or only those that
/// train.
void note_weights_written(bool frozen);

class Fp8Linear {
 public:
  static constexpr int64_t kSlots = 3;  ///< input, weight, gradient

  explicit Fp8Linear(Fp8Options options) : options_(std::move(options)) {}
  const Fp8Options& options() const { return options_; }
  Fp8Scaling scaling() const {
    return options_.recipe == Fp8Recipe::kBlockwise ? Fp8Scaling::kRows : Fp8Scaling::kTensor;
  }

  /// Whether this is training, whose magnitudes the history records. Holds for the backward of what runs next.
  void set_training(bool on) { training_ = on; }

  /// x W^T (+ addend, whose memory may be used for the result: make it with `product`). `amax` becomes what backward
  /// needs to quantise x alike. x [rows, in].
  at::Tensor forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& addend, at::Tensor* amax);
  /// An uninitialised result for rows of x.
  at::Tensor product(const at::Tensor& x, int64_t columns) const;

  /// dy [rows, out]: straight for the input's gradient, turned for the weight's.
  Fp8Pair gradient(const at::Tensor& dy, bool straight, bool turned);
  /// dy W (+ addend), [rows, in] of `dtype`.
  at::Tensor input_gradient(const Fp8Matrix& dy, int64_t rows, at::ScalarType dtype, const at::Tensor& weight,
                            const at::Tensor& addend);
  /// x as backward multiplies it: dW = turned dy times turned x.
  Fp8Matrix turned_input(const at::Tensor& x, const at::Tensor& amax);

  /// Whether the quantised weight stays until the weight changes (the default), or is made for every use: where the
  /// weight itself comes and goes.
  void keep_weight(bool keep) { keep_ = keep; }
  /// Bytes this layer keeps of its weight from one step to the next, beside the parameter.
  int64_t weight_bytes(int64_t elements) const;

  /// fp8_param: from now on every `weight` given here is codes, [out, in] float8_e4m3fn, that count what `stored_scale`
  /// says. They are multiplied as they lie there; backward turns them round for itself.
  void store_weight(const at::Tensor& codes);
  bool stores_weight() const { return stored_scale_.defined(); }
  const at::Tensor& stored_scale() const { return stored_scale_; }  ///< as Fp8Matrix::scale
  /// Quantises `values` [out, in] into the codes. Collective over `tp` where one scale serves the whole tensor.
  void quantize_weight(const at::Tensor& values, const at::Tensor& codes);
  int64_t weight_slot() const { return options_.first_slot + kWeight; }  ///< of the history
  /// What the codes stand for, in fp32.
  at::Tensor weight_values(const at::Tensor& codes) const;

 private:
  enum Slot { kInput, kWeight, kGradient };
  /// The magnitude to scale for; raises the history.
  at::Tensor reference(const at::Tensor& x, Slot slot, bool split);
  /// `scaled_for`: takes the magnitude that the scale is for, where one serves the whole tensor.
  Fp8Pair quantize(const at::Tensor& x, Slot slot, bool split, Fp8Quantization how, at::Tensor* scaled_for = nullptr);
  Fp8Matrix weight(const at::Tensor& weight, bool turned);

  Fp8Matrix stored(const at::Tensor& codes) const;

  Fp8Options options_;
  at::Tensor stored_scale_;
  bool training_ = true, keep_ = true;
  Fp8Pair weight_;  // both ways, until the weight changes
  struct Stamp {
    const void* data = nullptr;
    uint64_t version = 0, writes = 0;
    bool operator==(const Stamp&) const = default;
  } stamp_;
};

/// dW from dy and x, both turned: undefined when it goes into the `main` gradient (null: there is none), or when the
/// schedule wants it later (layers/weight_gradients.h).
at::Tensor fp8_weight_gradient(const at::Tensor& weight, const std::shared_ptr<MainGradient>& main, const Fp8Matrix& dy,
                               const Fp8Matrix& x);

}  // namespace mcore_bridge
