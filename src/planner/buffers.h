// Weights, gradients and optimizer states of a rank on paper, in the buckets that training would lay them out in.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "mcore_bridge/optimizer_options.h"
#include "train/parameter_buffers.h"

namespace mcore_bridge {

struct PlannedBuffers {
  struct Bucket {
    int64_t elements = 0;  ///< padding included
    int64_t ranks = 1;     ///< of its group
    int64_t element = 4;   ///< bytes of a parameter
    bool trainable = true, expert = false;
    int chunk = 0, unit = 0;  ///< of its first parameter
  };
  std::vector<Bucket> buckets;
  Sharding sharding = Sharding::kNone;
  int64_t grad_element = 4;  ///< bytes of a gradient
  int64_t parameters = 0;    ///< elements
  int64_t trainable = 0;     ///< elements
  int64_t weights = 0;       ///< bytes kept all the time, as are the next two
  int64_t gradients = 0;
  int64_t optimizer = 0;  ///< masters and states on the device, without what is offloaded
  /// Bytes that come and go with a unit.
  struct Unit {
    int64_t parameters = 0;  ///< gathered
    int64_t gradients = 0;   ///< whole
    int64_t copied = 0;      ///< that Gloo, on the CPU, copies of its largest bucket
  };
  std::map<std::pair<int, int>, Unit> units;  ///< by chunk and unit
  /// Most that comes and goes while unit `unit` runs backward: its own, the next one's parameters (not at the head,
  /// whose worst moment is in forward), and the gradients of the one before, which a reduction reads until the next one
  /// starts. `copies`: Gloo's as well.
  int64_t passing(int chunk, int unit, bool head, bool copies) const;
  int64_t copied = 0;  ///< bytes that Gloo, on the CPU, copies of the largest bucket to share it out
  /// Elements of this rank's gradients that are summed once a step: over tensor ranks, over expert-tensor ranks, over
  /// the tied embedding's stages, and by the number of copies of shared rows.
  int64_t partial = 0, expert_partial = 0, tied = 0;
  std::map<int, int64_t> shared;
  int64_t magnitudes = 0;  ///< of the weights that train as FP8 codes: ranks agree on them once a step
};

/// `parameters`: all of the stage's, of every chunk; meta tensors do. Of rank 0 of the data-parallel group.
PlannedBuffers plan_buffers(const std::vector<ManagedParameter>& parameters, const ParallelState& parallel,
                            const OptimizerOptions& options);

}  // namespace mcore_bridge
