// Random numbers that ranks draw alike or apart.
//
// torch's default generator is the same on all ranks of a pipeline stage (set_random_seed). That is right for dropout
// of what tensor-parallel ranks hold alike; what they (or context-parallel ranks) hold parts of needs streams of its
// own.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "parallel/parallel_state.h"

namespace mcore_bridge {

enum class RandomStream {
  kReplicated,  ///< alike on tensor-parallel ranks, apart on context-parallel ones
  kSplit        ///< apart on tensor- and context-parallel ranks: attention heads, shards of the sequence or of features
};

/// While alive, everything on `device` that draws from the default generator draws from `stream`. Data-parallel ranks
/// draw alike. Streams start from the default generator's seed and this rank's place; with one tensor- and
/// context-parallel rank both are the default generator itself.
class RandomScope {
 public:
  RandomScope(RandomStream stream, const ParallelState& parallel, c10::Device device);
  ~RandomScope();
  RandomScope(const RandomScope&) = delete;
  RandomScope& operator=(const RandomScope&) = delete;

 private:
  at::Tensor* stream_ = nullptr;  ///< state of the stream; null: the default generator
  c10::Device device_;
  at::Tensor outside_;  ///< state of the default generator
};

/// Starts the streams anew from the default generators' seeds, at their next use.
void reset_random_streams();

/// The states of all streams that ops on `device` draw from (its own and the CPU's), and back.
std::vector<at::Tensor> random_state(c10::Device device);
void set_random_state(c10::Device device, const std::vector<at::Tensor>& states);

}  // namespace mcore_bridge
