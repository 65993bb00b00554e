// All parameters of a rank's chunks in buckets, and their gradients' way from autograd to the optimizer.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "mcore_bridge/bridge.h"
#include "train/bucket.h"
#include "train/complete_gradients.h"

namespace mcore_bridge {

struct BufferOptions {
  Sharding sharding = Sharding::kOptimizer;
  bool overlap_grad_reduce = false, overlap_param_gather = false;
  at::ScalarType grad_dtype = at::kFloat;
  int64_t bucket_elements = 40'000'000;
  /// Parameters of one class are updated alike and lie together; whole ones lie on one rank.
  std::function<int(const ManagedParameter&)> class_of = [](const ManagedParameter&) { return 0; };
  std::function<bool(const ManagedParameter&)> whole = [](const ManagedParameter&) { return false; };
};

/// The buckets of `parameters` (an item each, in their order), which hold those that train, with kParameters the frozen
/// ones too. Arithmetic only: nothing is allocated, groups need not communicate.
std::vector<BucketLayout> bucket_layouts(const std::vector<ManagedParameter>& parameters, const ParallelState& parallel,
                                         const BufferOptions& options);

class ParameterBuffers {
 public:
  /// Takes the parameters that require gradients, with kParameters the frozen ones too. Collective with kParameters.
  ParameterBuffers(std::vector<ManagedParameter> parameters, ParallelStatePtr parallel, BufferOptions options);
  ~ParameterBuffers();
  ParameterBuffers(const ParameterBuffers&) = delete;
  ParameterBuffers& operator=(const ParameterBuffers&) = delete;

  const std::vector<ManagedParameter>& parameters() const { return parameters_; }
  const std::vector<std::unique_ptr<Bucket>>& buckets() const { return buckets_; }
  const BufferOptions& options() const { return options_; }

  /// Zeroes the gradients and connects the parameters to them, before a step of so many backwards per chunk.
  void begin(int micro_batches);
  /// Everything reduced and completed: grad_shard() of every bucket is final.
  void finish_gradients();
  /// Sum of squares such that adding it up over the world counts every element of the model once. double scalar.
  at::Tensor sum_of_squares() const;
  /// After the optimizer: parameters follow their shards (before the next use of each with overlap_param_gather).
  void gather_parameters();
  /// Autograd's gradients go to .grad again, as without a trainer.
  void disconnect();

  /// Buckets that hold parameters of a unit.
  std::vector<Bucket*> buckets_of(int chunk, int unit) const;

 private:
  class Hook;
  void connect();
  void arrived(size_t bucket, size_t entry);
  std::vector<GradientPiece> pieces(bool norm) const;

  ParallelStatePtr parallel_;
  BufferOptions options_;
  std::vector<ManagedParameter> parameters_;
  std::vector<std::unique_ptr<Bucket>> buckets_;
  int micro_batches_ = 0;
  bool connected_ = false;
  /// Gradients counted, by bucket and entry (sharded gradients: since the last reduction).
  std::vector<std::vector<int>> arrived_;
  std::vector<size_t> missing_;  ///< entries of a bucket that are not complete
  size_t launched_ = 0;          ///< buckets whose reduction has started, in order
  Bucket* reducing_ = nullptr;
};

/// The parameters of all chunks.
std::vector<ManagedParameter> managed_parameters(const Chunks& chunks);

}  // namespace mcore_bridge
