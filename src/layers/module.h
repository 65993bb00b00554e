// A tree of named parameters. Lighter than torch::nn::Module (which pulls in the serializer); Python mirrors this tree
// as torch.nn.Modules that hold the very same tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "layers/footprint.h"

namespace mcore_bridge {

/// What training must know about a parameter beyond its values.
struct ParameterTraits {
  /// Split over the tensor-parallel group (each rank owns different elements). False: every rank holds the same values.
  bool tp_split = false;
  /// Each tensor-parallel rank's gradient is a partial sum; add them before the optimizer.
  bool sum_over_tp = false;
  /// Rows [first, first+count) of a tp_split parameter are held alike by `copies` neighbouring tensor-parallel ranks
  /// (key and value heads when there are fewer of them than ranks). Their gradients are partial sums too.
  int64_t shared_first_row = 0, shared_rows = 0;
  int shared_copies = 1;
  /// The embedding matrix when it is also the output matrix of another pipeline stage.
  bool tied_embedding = false;
  bool no_weight_decay = false;  ///< norms, biases
  bool expert = false;           ///< of an expert: replicas are the expert-data-parallel ranks
  bool buffer = false;           ///< saved and loaded, but not trained: never has a gradient
  bool vocabulary = false;       ///< a matrix with a row per token: embedding, output layer
  bool split_columns = false;    ///< tp_split matrices: columns (dim 1) are split instead of rows
  /// Matrices that share this parameter, stacked by rows: `blocks` times one block with so many rows of each (q, k, v
  /// per key/value head; gate and up; LoRA A's of a fused layer). Empty widths: one matrix.
  struct Parts {
    int64_t blocks = 1;
    std::vector<int64_t> widths;
  } parts = {};
};

struct NamedParameter {
  std::string name;
  at::Tensor tensor;
  ParameterTraits traits;
};

class Module {
 public:
  virtual ~Module() = default;
  Module() = default;
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  /// Class name as users of Megatron know it ("ColumnParallelLinear"); Python names the mirrored class by it.
  virtual std::string kind() const = 0;

  /// Parameters of the whole tree in a fixed order, names joined by dots.
  std::vector<NamedParameter> named_parameters() const;
  /// (dotted name, kind) of every module of the tree, parents first; the root's name is "".
  std::vector<std::pair<std::string, std::string>> named_modules() const;

  /// What one micro-batch costs in this module, its children included; a change of what a layer keeps, computes or
  /// sends changes its footprint. The default adds up the children one after the other.
  virtual Footprint footprint(const ActivationShape& shape) const;

  /// Dropout acts only while training.
  void train(bool on);
  bool training() const { return training_; }

  struct Child {
    std::string name;
    Module* module;
  };
  virtual std::vector<Child> children() const { return {}; }
  /// Parameters of this module itself, without children.
  virtual std::vector<NamedParameter> own_parameters() const { return {}; }

 private:
  bool training_ = true;
};

}  // namespace mcore_bridge
