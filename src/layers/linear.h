// Linear layers split over the tensor-parallel ranks, with an optional norm in front and LoRA adapters beside.
//
// Shapes: x_sbh is [sequence, batch, hidden]; with sequence parallelism activations between matrices hold 1/tp of dim
// 0.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "layers/linear_function.h"
#include "layers/module.h"
#include "layers/wide_weight.h"
#include "parallel/parallel_state.h"
#include "parallel/random.h"
#include "plan/weight_rule.h"

namespace mcore_bridge {

/// One adapter on one linear layer. With P fused parts of which some are adapted, A stacks one [r, in] block per
/// adapted part and B holds the rows of the adapted parts in the layer's own fused order, so every part has its own A
/// and B, as in PEFT.
struct LoraAdapter {
  at::Tensor a;             ///< [adapted parts * r, in (/ tp when row-parallel)]
  at::Tensor b;             ///< [out rows of the adapted parts (/ tp when column-parallel), r]
  std::vector<bool> parts;  ///< which fused parts (q, k, v / gate, up) are adapted
  int64_t r = 0;
  double scaling = 1, dropout = 0;
};

struct LinearOptions {
  int64_t in = 0, out = 0;  ///< whole sizes
  Shard shard = Shard::kColumn;
  Fuse fuse = Fuse::kNone;
  HeadLayout heads;  ///< kQkv only
  bool bias = false;
  bool norm = false;  ///< RMSNorm in front, its weight called layer_norm_weight
  double norm_epsilon = 1e-5;
  bool norm_zero_centered = false;
  bool sequence_parallel = false;
  bool overlap = false;  ///< with sequence_parallel: tp_comm_overlap
  bool gated = false;    ///< called by forward_gated
};

/// Column-parallel: y = norm(x) W^T with the rows of W split; gathers the sequence (or copies) in front.
/// Row-parallel: the columns of W split; reduces (or reduce-scatters) behind, then adds the bias.
class ParallelLinear : public Module {
 public:
  ParallelLinear(LinearOptions options, ParallelStatePtr parallel, at::TensorOptions tensor_options);

  std::string kind() const override;
  std::vector<Child> children() const override { return {}; }
  /// weight, bias, layer_norm_weight; once adapted: base_layer.weight, ..., lora_A.<adapter>.weight,
  /// lora_B.<adapter>.weight
  std::vector<NamedParameter> own_parameters() const override;

  at::Tensor forward(const at::Tensor& x_sbh) { return forward(x_sbh, {}).y; }
  /// With the norm in front: normalises x + delta and passes the sum on; see LinearOutput. `delta` may be undefined.
  LinearOutput forward(const at::Tensor& x_sbh, const at::Tensor& delta);
  /// act(gate) * up of x = [gate | up] in front of the product. `unused`: see LinearPlan.
  at::Tensor forward_gated(const at::Tensor& x_sbh, const GatedOptions& activation, bool unused = false);
  Footprint footprint(const ActivationShape& shape) const override { return footprint(shape, /*gated=*/false); }
  /// `gated`: of forward_gated.
  Footprint footprint(const ActivationShape& shape, bool gated) const;

  const LinearOptions& options() const { return options_; }
  const at::Tensor& weight() const { return weight_; }
  const std::map<std::string, LoraAdapter>& adapters() const { return adapters_; }
  /// A zeroed-B adapter on the parts marked; A is left for the caller to fill.
  void add_adapter(const std::string& name, std::vector<bool> parts, int64_t r, double scaling, double dropout);
  /// Elements of memory behind each row of a frozen weight that the only adapter's B asks for, so that y is one product
  /// (layers/adapted_product.h); 0 where x comes from elsewhere, with FP8 and between shards of the sequence.
  int64_t room() const;
  /// Moves the weight to where it has that much, unless it has.
  void make_room();
  /// From now on the weight's products are in FP8 (adapters stay as they are). ValueError names what does not fit.
  void set_fp8(const std::string& name, Fp8Options options);
  const std::shared_ptr<Fp8Linear>& fp8() const { return fp8_; }
  at::ScalarType dtype() const { return dtype_; }  ///< of inputs, outputs and the weight's values
  /// fp8_param, in front of set_fp8: the parameter becomes FP8 codes (float8_e4m3fn), zeros for now, its former memory
  /// is given back; the scales are a buffer beside it, weight_scale_inv.
  void store_weight_in_fp8();
  bool weight_in_fp8() const { return fp8_ && fp8_->stores_weight(); }
  /// The weight's values in the layer's dtype: the parameter itself, or in new memory those its codes were made from if
  /// they are known (`wide`), else what the codes stand for.
  at::Tensor weight_values() const;
  /// Copies `values` [out, in] into the weight, or quantises them; those of a weight that trains are kept for its
  /// master. Collective over the tensor-parallel ranks.
  void set_weight_values(const at::Tensor& values);
  WideWeight& wide() { return wide_; }  ///< of weight_in_fp8
  const WideWeight& wide() const { return wide_; }
  /// W + scaling * B A of this adapter, in a new tensor of W's dtype; W itself does not change. Local, no
  /// communication.
  at::Tensor merged_weight(const std::string& adapter) const;

 private:
  /// B A x for the adapted parts, laid out like the layer's output (of the whole sequence, x being a shard or not).
  at::Tensor adapter_output(const LoraAdapter& adapter, const at::Tensor& x) const;
  /// Between shards of the sequence.
  bool sharded() const { return options_.sequence_parallel && parallel_->tp.size() > 1; }
  /// Only a column-parallel layer without sequence parallelism sees the same x on all tensor ranks.
  RandomStream dropout_stream() const;
  /// The layer as one autograd node: everywhere but between shards of the sequence.
  LinearOutput run(const at::Tensor& x, const at::Tensor& delta, LinearPlan plan) const;
  /// Between shards: from what stands in front of the product.
  at::Tensor forward_sharded(const at::Tensor& x) const;
  /// In front of products in FP8.
  void prepare_fp8() const;

  LinearOptions options_;
  ParallelStatePtr parallel_;
  at::ScalarType dtype_;
  at::Tensor weight_, bias_, layer_norm_weight_;
  std::map<std::string, LoraAdapter> adapters_;
  std::shared_ptr<Fp8Linear> fp8_;
  WideWeight wide_;
};

}  // namespace mcore_bridge
