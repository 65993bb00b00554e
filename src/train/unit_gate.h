// Parameters put in place for the unit that runs: full sharding, and gathers that overlap with the forward pass.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "models/parameter_gate.h"
#include "train/parameter_buffers.h"

namespace mcore_bridge {

class UnitGate : public ParameterGate, public std::enable_shared_from_this<UnitGate> {
 public:
  /// Of one chunk. The buffers live as long as the gate: the parameters lie in them.
  UnitGate(std::shared_ptr<ParameterBuffers> buffers, int chunk, int units);

  at::Tensor run(int unit, const at::Tensor& x, const std::function<at::Tensor(const at::Tensor&)>& f) override;
  void hold(const std::function<bool(const std::string&)>& wanted) override;
  void release_all() override;

 private:
  void start(int unit);
  void place(int unit);
  void release(int unit);
  bool shards_parameters() const { return buffers_->options().sharding == Sharding::kParameters; }

  std::shared_ptr<ParameterBuffers> buffers_;
  std::vector<std::vector<Bucket*>> units_;
  int held_ = 0;
  int kept_ = -1;  ///< a unit left in place after its forward because its backward comes next
};

}  // namespace mcore_bridge
