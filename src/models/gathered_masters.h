// Weights that train as FP8 codes, at full precision for a while.
#pragma once

#include <vector>

#include "mcore_bridge/bridge.h"

namespace mcore_bridge {

class ParallelLinear;

/// While it lives, ParallelLinear::weight_values() of weights that a trainer has masters of (fp8_param) is those
/// masters' values, in host memory. Collective over the ranks that hold the same weights; nothing else of it is.
class GatheredMasters {
 public:
  explicit GatheredMasters(const Chunks& chunks);
  ~GatheredMasters();
  GatheredMasters(const GatheredMasters&) = delete;
  GatheredMasters& operator=(const GatheredMasters&) = delete;

 private:
  Chunks chunks_;
  std::vector<ParallelLinear*> gathered_;
};

}  // namespace mcore_bridge
