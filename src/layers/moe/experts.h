// The experts of one layer that this rank holds: a gated MLP per expert, weights stacked.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "layers/activation.h"
#include "layers/module.h"
#include "layers/moe/grouped_linear.h"
#include "mcore_bridge/model_config.h"
#include "parallel/parallel_state.h"

namespace mcore_bridge {

/// One adapter on one grouped layer: every expert has an A and a B of its own for each adapted part.
struct GroupedLoraAdapter {
  at::Tensor a;             ///< [experts, adapted parts * r, in]
  at::Tensor b;             ///< [experts, out rows of the adapted parts, r]
  std::vector<bool> parts;  ///< which parts of the outputs (gate, up) are adapted
  int64_t r = 0;
  double scaling = 1, dropout = 0;
};

/// weight [experts, out, in] (and bias [experts, out]); column-parallel layers hold a slice of the outputs,
/// row-parallel ones of the inputs, over the expert-tensor-parallel ranks.
class GroupedParallelLinear : public Module {
 public:
  struct Options {
    int64_t experts = 0, in = 0, out = 0;  ///< local sizes
    int64_t parts = 1;                     ///< equal parts of the outputs, each an adapter target
    bool column = true, bias = false;
  };
  GroupedParallelLinear(Options options, ParallelStatePtr parallel, at::TensorOptions tensor_options);
  std::string kind() const override;
  /// weight, bias; once adapted: base_layer.weight, ..., lora_A.<adapter>.weight, lora_B.<adapter>.weight
  std::vector<NamedParameter> own_parameters() const override;
  /// Row-parallel: a partial sum; the bias is added by one rank of the group only.
  at::Tensor forward(const at::Tensor& rows, const ExpertRows& groups) const;
  const at::Tensor& weight() const { return weight_; }
  /// Of `rows` rows, `computed` of which belong to an expert; without the ends of the groups.
  Footprint footprint(int64_t rows, int64_t computed, const ActivationShape& shape) const;

  const std::map<std::string, GroupedLoraAdapter>& adapters() const { return adapters_; }
  /// A zeroed-B adapter on the parts marked; A is left for the caller to fill.
  void add_adapter(const std::string& name, std::vector<bool> parts, int64_t r, double scaling, double dropout);
  /// W + scaling * B A of this adapter, in a new tensor of W's dtype; W itself does not change.
  at::Tensor merged_weight(const std::string& adapter) const;

 private:
  at::Tensor adapter_output(const GroupedLoraAdapter& adapter, const at::Tensor& rows, const ExpertRows& groups) const;

  Options options_;
  ParallelStatePtr parallel_;
  at::Tensor weight_, bias_;
  std::map<std::string, GroupedLoraAdapter> adapters_;
};

class Experts : public Module {
 public:
  Experts(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options);
  std::string kind() const override { return "GroupedMLP"; }
  std::vector<Child> children() const override { return {{"linear_fc1", fc1_.get()}, {"linear_fc2", fc2_.get()}}; }
  /// rows [n, h] sorted by expert -> [n, h], partial over the expert-tensor-parallel ranks.
  at::Tensor forward(const at::Tensor& rows, const ExpertRows& groups) const;
  /// Any of their parameters does.
  bool learns() const;
  /// As GroupedParallelLinear's; its workspace is beside all that a whole MoELayer keeps but `freed` bytes.
  Footprint footprint(int64_t rows, int64_t computed, int64_t freed, const ActivationShape& shape) const;

 private:
  GatedOptions gate_;
  std::unique_ptr<GroupedParallelLinear> fc1_, fc2_;
};

}  // namespace mcore_bridge
