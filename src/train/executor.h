// Runs one pipeline stage's row of a schedule table.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "mcore_bridge/bridge.h"
#include "mcore_bridge/schedule.h"
#include "models/gpt_model.h"

namespace mcore_bridge {

class Executor {
 public:
  explicit Executor(const Chunks& chunks) : chunks_(chunks) {}

  /// Forward and backward of all micro-batches. `weights[i]`: what every token's loss of micro-batch i is multiplied
  /// by. Returns this rank's weighted sum of losses (double scalar on the device; zero before the last stage).
  at::Tensor train(const std::vector<StageSchedule>& schedule, const std::vector<ForwardInput>& batches,
                   const std::vector<double>& weights);

  /// Forward only.
  at::Tensor evaluate(const std::vector<ForwardInput>& batches, const std::vector<double>& weights);

 private:
  struct Live {
    at::Tensor input, output;  ///< hidden states entering and leaving the stage (output: the losses on the last one)
    std::shared_ptr<Group::Pending> sent;
  };
  at::Tensor empty_hidden(const ForwardInput& batch) const;
  void forward(int micro_batch);
  void backward(int micro_batch);
  void exchange(const std::vector<Action::Message>& messages);

  const Chunks& chunks_;
  const std::vector<ForwardInput>* batches_ = nullptr;
  const std::vector<double>* weights_ = nullptr;
  at::Tensor loss_;
  std::map<int, Live> live_;                                ///< by micro-batch
  std::map<int, at::Tensor> gradients_in_, gradients_out_;  ///< of outputs, received; of inputs, to send
  std::deque<std::shared_ptr<Group::Pending>> sends_;       ///< gradients under way
};

}  // namespace mcore_bridge
