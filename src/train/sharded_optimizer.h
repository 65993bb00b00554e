// The optimizer: masters, states and their updates, for this rank's share of the parameter buffers.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "mcore_bridge/optimizer_options.h"
#include "train/loss_scaler.h"
#include "train/optimizer_state.h"
#include "train/parameter_buffers.h"
#include "train/shard_quantizer.h"
#include "train/update_rule.h"

namespace mcore_bridge {

/// How the options want the parameters laid out.
BufferOptions buffer_options(const OptimizerOptions& options);

class ShardedOptimizer : public Optimizer {
 public:
  /// `fp16`: activations are, whatever the parameters at hand are in: the loss is scaled.
  ShardedOptimizer(std::shared_ptr<ParameterBuffers> buffers, ParallelStatePtr parallel,
                   const OptimizerOptions& options, bool fp16);

  /// Before a step: parameters that were written since the last one (loaded weights) are taken over by their masters.
  void take_over();
  /// Updates what lives on the device; the host need not know `grad_scale` and `skip` (fp32 scalars there).
  void step(double lr, double weight_decay, const at::Tensor& grad_scale, const at::Tensor& skip);
  /// After the updates: weights kept as FP8 codes follow their masters. Collective.
  void quantize();
  /// Whether finish_on_host has anything to do.
  bool offloads() const { return !host_.empty(); }
  /// After step(), once the host knows the scalars: updates what is kept in host memory.
  void finish_on_host(double grad_scale, bool skip);

  std::vector<StateSlice> state() override;
  bool trains(const at::Tensor& codes) const override { return quantizer_ && quantizer_->trains(codes); }
  int64_t steps() const override;
  void set_steps(int64_t steps) override;
  void state_loaded() override;
  Json scalars() const override;
  void set_scalars(const Json& values) override;

  LossScaler& scaler() { return scaler_; }
  const LossScaler& scaler() const { return scaler_; }
  int64_t skipped = 0;  ///< steps skipped so far

  /// Bytes of masters and states, on the device and in host memory.
  int64_t device_bytes() const { return bytes(device_) + (quantizer_ ? quantizer_->bytes() : 0); }
  int64_t host_bytes() const { return bytes(host_); }

 private:
  struct Task {
    const UpdateRule* rule;
    std::vector<Segment*> segments;
  };
  void make_segments(const Bucket& bucket);
  void add_segment(Segment segment, const UpdateRule* rule);
  /// Masters begin with their parameters' values.
  void masters_began();
  void take_values(const Segment& segment, const Segment::Piece& piece);
  void write_back(const std::vector<Segment*>& segments);
  static int64_t bytes(const std::vector<Segment*>& segments);

  std::shared_ptr<ParameterBuffers> buffers_;
  OptimizerOptions options_;
  LossScaler scaler_;
  std::unique_ptr<UpdateRule> rule_, scalar_rule_;  ///< matrices, the rest (null: the same)
  std::vector<std::unique_ptr<Segment>> segments_;
  std::vector<Segment*> device_, host_;
  std::shared_ptr<ShardQuantizer> quantizer_;  ///< null without weights that train as FP8 codes
  std::vector<std::string> imprecise_;         ///< of those, whose masters begin with what codes stand for
  std::vector<Task> tasks_;                    ///< one per rule and place
  int64_t to_offload_ = 0;                     ///< elements still to be put into host memory
  at::Tensor steps_, host_steps_;              ///< updates done, fp32 scalars
  double lr_ = 0, weight_decay_ = 0;           ///< of the step under way
  std::vector<uint32_t> versions_;             ///< of the parameters when last seen
};

}  // namespace mcore_bridge
