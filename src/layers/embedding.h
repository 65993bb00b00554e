// The two matrices of the vocabulary, split by rows (tokens) over the tensor-parallel ranks.
#pragma once

#include "layers/module.h"
#include "parallel/parallel_state.h"

namespace mcore_bridge {

struct VocabOptions {
  int64_t vocab_size = 0;  ///< without the padding that makes tp divide it
  int64_t hidden_size = 0;
  bool sequence_parallel = false;
  bool tied_over_stages = false;  ///< first and last pipeline stage hold the same matrix
  int64_t local_rows(int tp) const { return (vocab_size + tp - 1) / tp; }
};

class VocabParallelEmbedding : public Module {
 public:
  VocabParallelEmbedding(VocabOptions options, ParallelStatePtr parallel, at::TensorOptions tensor_options);
  std::string kind() const override { return "VocabParallelEmbedding"; }
  std::vector<NamedParameter> own_parameters() const override;
  /// ids [b, s] -> [s, b, h], or [s / tp, b, h] with sequence parallelism.
  at::Tensor forward(const at::Tensor& ids) const;
  Footprint footprint(const ActivationShape& shape) const override;
  const at::Tensor& weight() const { return weight_; }

 private:
  VocabOptions options_;
  ParallelStatePtr parallel_;
  at::Tensor weight_;
};

/// Logits of this rank's tokens. Owns its matrix unless it is tied to an embedding on the same stage.
class OutputLayer : public Module {
 public:
  OutputLayer(VocabOptions options, ParallelStatePtr parallel, at::TensorOptions tensor_options, bool own_weight);
  std::string kind() const override { return "ColumnParallelLinear"; }
  std::vector<NamedParameter> own_parameters() const override;
  /// [s', b, h] -> [s, b, local vocabulary]; `tied` is the embedding matrix when this layer has none of its own.
  at::Tensor forward(const at::Tensor& x_sbh, const at::Tensor& tied) const;
  /// Without the embedding's matrix: `tied_grad` says whether that learns when it is this layer's. Of forward alone, or
  /// with shape.training_loss of linear_cross_entropy.
  Footprint footprint(const ActivationShape& shape, bool tied_grad) const;
  /// Columns of this rank's logits.
  int64_t columns() const { return options_.local_rows(parallel_->tp.size()); }
  /// The matrix in use.
  const at::Tensor& weight(const at::Tensor& tied) const { return weight_.defined() ? weight_ : tied; }

 private:
  VocabOptions options_;
  ParallelStatePtr parallel_;
  at::Tensor weight_;
};

}  // namespace mcore_bridge
