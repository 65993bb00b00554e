// Forward and backward of whole micro-batches as CUDA graphs, one for each shape that comes back. Packed rows are
// padded to few shapes (graph_shape.h).
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/cuda/graph.h"
#include "layers/main_gradient.h"
#include "mcore_bridge/optimizer_options.h"
#include "models/gpt_model.h"
#include "train/graph_input.h"

namespace mcore_bridge {

class MicroBatchGraphs {
 public:
  /// Most graphs kept; beyond them the one that was not used for longest goes. Packed rows of one length come in some
  /// numbers of documents, by some lengths, each as a step's first micro-batch and as a later one.
  static constexpr size_t kMost = 32;

  /// Throws where a micro-batch of this model cannot be recorded, saying why.
  MicroBatchGraphs(const GPTModel& model, const OptimizerOptions& options);

  /// Does `work` for `batch` (tensors best on the host, documents filling the row): forward and backward, adding to
  /// loss() and to gradients that stay where they are. It may read no tensors but those it is given and the model's.
  /// Runs it, or launches what it enqueued for an earlier batch of the same shape.
  void run(const ForwardInput& batch, const std::function<void(const ForwardInput&)>& work);

  /// float64 scalar that stays where it is.
  const at::Tensor& loss() const { return loss_; }
  int64_t recorded() const { return recorded_; }  ///< graphs, those that went included
  int64_t replayed() const { return replayed_; }

 private:
  using Key = std::vector<int64_t>;
  struct Entry {
    int64_t runs = 0, last = 0;
    std::unique_ptr<cuda::Graph> graph;
    std::optional<GraphInput> input;  ///< what the graph reads
    std::vector<bool> fresh_after;    ///< state of the main gradients behind it
  };

  Key key_of(const ForwardInput& batch) const;
  std::vector<bool> fresh() const;
  void forget();

  const GPTModel& model_;
  int64_t warmup_ = 1;
  bool shared_shapes_ = false;  ///< packed rows take graph_shape: attention reads where documents end on the device
  std::unique_ptr<cuda::GraphRecorder> recorder_;
  std::vector<std::shared_ptr<MainGradient>> gradients_;
  at::Tensor loss_;
  std::map<Key, Entry> entries_;
  int64_t clock_ = 0, recorded_ = 0, replayed_ = 0;
};

}  // namespace mcore_bridge
