// A decoder-only language model, or the chunk of it that one pipeline stage holds.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "families/family.h"
#include "layers/embedding.h"
#include "layers/module.h"
#include "layers/transformer_layer.h"
#include "mcore_bridge/model.h"
#include "models/fp8_scales.h"
#include "models/parameter_gate.h"
#include "parallel/parallel_state.h"

namespace mcore_bridge {

class GPTModel : public Module {
 public:
  GPTModel(const ModelConfig& config, ParallelStatePtr parallel, int vp_stage, const std::string& device);

  std::string kind() const override { return "GPTModel"; }
  std::vector<Child> children() const override;

  /// See mcore_bridge::forward.
  at::Tensor forward(const ForwardInput& input, bool gather_output = false);

  /// What one micro-batch costs, in the order of forward: the embedding, every unit of layers (a layer, or the layers
  /// recomputed together), the head with the loss.
  struct Segment {
    std::string name;
    int64_t layers = 0;  ///< decoder layers in it
    Footprint footprint;
    int64_t produced = 0;  ///< bytes forward makes for backward, recomputed ones included
  };
  std::vector<Segment> segments(const ActivationShape& shape) const;

  const ModelConfig& config() const { return config_; }
  const ParallelState& parallel() const { return *parallel_; }
  const ParallelStatePtr& parallel_ptr() const { return parallel_; }
  const ChunkPlace& place() const { return place_; }
  int vp_stage() const { return vp_stage_; }
  c10::Device device() const { return device_; }
  /// The output layer uses the embedding matrix (of this or another stage).
  bool share_embeddings_and_output_weights() const { return !config_.untie_embeddings_and_output_weights; }

  /// Weight rules of this chunk's own parameters (adapters excluded), names as named_parameters() gives them without
  /// the ".base_layer" that an adapter inserts.
  std::vector<WeightRule> rules() const { return chunk_weights(config_, place_); }

  /// Linear layers of the decoder by name, where adapters can go.
  struct NamedLinear {
    std::string name;
    ParallelLinear* layer;
  };
  std::vector<NamedLinear> linears();
  /// ParallelLinear::make_room of all of them.
  void make_room_for_adapters();

  /// The experts' matrices by name, where adapters can go too.
  struct NamedGroupedLinear {
    std::string name;
    GroupedParallelLinear* layer;
  };
  std::vector<NamedGroupedLinear> grouped_linears();

  /// Routers of the layers with experts, in order.
  std::vector<Router*> routers();

  /// Units of a ParameterGate. An embedding that is also this chunk's output matrix belongs to the output's unit.
  int units() const { return static_cast<int>(layers_.size()) + 2; }
  int unit_of(const std::string& parameter) const;
  void set_gate(std::shared_ptr<ParameterGate> gate) { gate_ = std::move(gate); }
  const std::shared_ptr<ParameterGate>& gate() const { return gate_; }

  /// Options of every adapter by name, for its files.
  std::map<std::string, LoraOptions> lora_options;

  /// Of the FP8 checkpoint the weights were loaded from; all chunks' on the first one.
  Fp8ScalesByName fp8_scales;

  /// Parameters an adapter trains in full and saves with it, named as in rules().
  std::vector<std::string> modules_to_save;

 private:
  AttentionInput attention_input(const ForwardInput& input) const;
  at::Tensor run_layers(at::Tensor x, const AttentionInput& attention, double loss_share);
  at::Tensor run_unit(int unit, const at::Tensor& x, const std::function<at::Tensor(const at::Tensor&)>& f) const {
    return gate_ ? gate_->run(unit, x, f) : f(x);
  }

  ModelConfig config_;
  ParallelStatePtr parallel_;
  int vp_stage_;
  ChunkPlace place_;
  c10::Device device_;
  std::unique_ptr<VocabParallelEmbedding> embedding_;
  std::vector<std::unique_ptr<TransformerLayer>> layers_;
  std::unique_ptr<Norm> final_norm_;
  std::unique_ptr<OutputLayer> output_;
  std::unique_ptr<RotaryEmbedding> rope_;
  std::shared_ptr<ParameterGate> gate_;
};

}  // namespace mcore_bridge
