// A PEFT adapter's additions to the weights of a checkpoint, by Hugging Face names alone: any model type.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bridge/checkpoint_reader.h"
#include "bridge/logical_tensors.h"
#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

class LoraMerge {
 public:
  /// `folder`: adapter_config.json and adapter_model.safetensors. ValueError names what a merge cannot do (DoRA,
  /// biases, embeddings), KeyError the modules that `weights` (names of the checkpoint) has not.
  LoraMerge(const std::string& folder, const std::vector<LogicalTensor>& weights);

  /// Whether the adapter changes this weight.
  bool touches(const std::string& weight) const { return pairs_.contains(weight); }
  /// values += scaling * B A, for rows [first, first + count) of the weight; in float.
  void add(const std::string& weight, int64_t first, int64_t count, float* values) const;

  /// Whole tensors the adapter brings (modules_to_save), by the weight's name in the checkpoint.
  const std::map<std::string, LogicalTensor>& replaced() const { return replaced_; }

 private:
  struct Pair {
    std::vector<float> a, b;  ///< [rank, cols], [rows, rank]
    int64_t rank = 0, cols = 0;
    float scaling = 1;
  };
  void read_config(const std::string& folder);
  float scaling_of(const std::string& module, int64_t rank) const;
  std::unique_ptr<CheckpointReader> reader_;
  std::map<std::string, Pair> pairs_;
  std::map<std::string, LogicalTensor> replaced_;
  Json config_;
};

}  // namespace mcore_bridge
