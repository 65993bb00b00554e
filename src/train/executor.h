// Runs one pipeline stage's row of a schedule table.
#pragma once

#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>

#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "layers/weight_gradients.h"
#include "mcore_bridge/bridge.h"
#include "mcore_bridge/schedule.h"
#include "models/gpt_model.h"
#include "train/micro_batch_graphs.h"

namespace mcore_bridge {

class Executor {
 public:
  Executor(const Chunks& chunks, const OptimizerOptions& options);

  /// Forward and backward of all micro-batches by the config's schedule. `weights[i]`: what every token's loss of
  /// micro-batch i is multiplied by. Returns this rank's weighted sum of losses (double scalar on the device; zero
  /// where the last chunk is not). With graphs() batches may be, and are best, on the host.
  at::Tensor train(const std::vector<ForwardInput>& batches, const std::vector<double>& weights);

  /// Forward only.
  at::Tensor evaluate(const std::vector<ForwardInput>& batches, const std::vector<double>& weights);

  /// Null without cuda_graph_impl.
  const MicroBatchGraphs* graphs() const { return graphs_.get(); }

 private:
  using Place = std::pair<int, int>;             ///< local chunk, micro-batch
  using Key = std::tuple<bool, int, int>;        ///< gradient, global chunk, micro-batch
  using Way = std::tuple<bool, bool, int, int>;  ///< send, then as Key
  /// What lives between forward and backward. The output itself does not: it goes when it is sent, autograd needs only
  /// the edge of its graph that ends there.
  struct Live {
    at::Tensor input;              ///< hidden states from the chunk before
    torch::autograd::Edge output;  ///< no function: nothing here trains
    at::Tensor losses;             ///< last chunk
  };

  at::Tensor train_with_graphs(const std::vector<ForwardInput>& batches, const std::vector<double>& weights);
  at::Tensor run(const std::vector<StageSchedule>& schedule, const std::vector<ForwardInput>& batches,
                 const std::vector<double>& weights);
  void forward(const Action& action);
  void backward(const Action& action);
  void backward_weight(const Action& action);
  void start(const std::vector<Action::Message>& messages);
  void wait(const std::vector<Action::Message>& messages);
  void clear();
  /// Makes NCCL's communicators in an order that is the same on all ranks: their first use blocks.
  void connect();

  int global(int chunk) const { return chunk * stages() + stage(); }
  int stages() const { return chunks_.at(0)->parallel().pp.size(); }
  int stage() const { return chunks_.at(0)->parallel().pp.rank(); }
  at::Tensor empty_hidden(const ForwardInput& batch) const;

  const Chunks& chunks_;
  std::map<std::pair<bool, int>, std::vector<StageSchedule>> schedules_;  ///< by training and micro-batches
  const std::vector<ForwardInput>* batches_ = nullptr;
  at::Tensor weights_;  ///< float64 [micro-batches] on the device
  at::Tensor loss_;
  std::map<Place, Live> live_;
  std::map<Place, WeightGradients> deferred_;
  std::map<Key, at::Tensor> inbox_, outbox_;
  std::map<Way, std::shared_ptr<Group::Transfer>> under_way_;
  bool connected_ = false;
  std::unique_ptr<MicroBatchGraphs> graphs_;
};

}  // namespace mcore_bridge
