// One linear layer as one autograd node: what stands in front of the product (a norm, a gated activation) is computed
// again in backward instead of kept, adapters are part of it, and so is the residual stream that passes by.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "kernels/gated_activation.h"
#include "kernels/lora_b.h"
#include "kernels/rms_norm.h"
#include "layers/fp8_linear.h"
#include "parallel/group.h"

namespace mcore_bridge {

struct LinearPlan {
  enum class Prologue { kNone, kNorm, kGated };
  struct Adapter {
    std::vector<bool> parts;
    double scaling = 1, dropout = 0;  ///< dropout: 0 outside training
  };
  Prologue prologue = Prologue::kNone;
  RmsNormOptions norm;
  GatedOptions activation = Activation::kSilu;
  PartLayout layout;
  std::vector<Adapter> adapters;
  /// Column-parallel: gathers the sequence (or copies) in front; else: reduces (or reduce-scatters) behind, then adds
  /// the bias.
  bool column = true, sequence_parallel = false;
  bool unused = false;  ///< nobody reads y, only its graph matters: zeros stand for it where that spares a product
  Group group;
  std::shared_ptr<Fp8Linear> fp8;  ///< the weight's products in FP8 (adapters keep their dtype); null: in x's dtype
};

struct LinearTensors {
  at::Tensor x_sbh;
  at::Tensor delta;  ///< added to x in front of the norm; or undefined
  at::Tensor weight, bias, norm_weight;
  std::vector<at::Tensor> a, b;  ///< of each adapter
};

struct LinearOutput {
  at::Tensor y;
  at::Tensor
      sum;  ///< x + delta: use it as the residual stream from here, so that its gradient joins the norm's in one pass
};

LinearOutput linear(const LinearPlan& plan, const LinearTensors& tensors);

/// expand_b for autograd.
at::Tensor expanded_b(const at::Tensor& b, const std::vector<bool>& parts, const PartLayout& layout, double scaling);

}  // namespace mcore_bridge
