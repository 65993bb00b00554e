// One flat buffer of parameters and one of their gradients, shared out over the ranks that hold the same parameters.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "layers/main_gradient.h"
#include "layers/module.h"
#include "parallel/group.h"
#include "train/bucket_layout.h"

namespace mcore_bridge {

class ParallelLinear;

/// What the ranks that hold the same parameters share out among themselves; each level includes those before it.
enum class Sharding {
  kNone,        ///< nothing: gradients are all-reduced
  kOptimizer,   ///< optimizer states and masters: reduce-scatter of gradients, all-gather of parameters, once per step
  kGradients,   ///< gradients: reduce-scattered after every backward of a unit
  kParameters,  ///< parameters: gathered for a unit's forward and backward
};

/// A parameter that training looks after.
struct ManagedParameter {
  std::string name;
  int chunk = 0;  ///< index of its model chunk
  int unit = 0;   ///< of GPTModel::units()
  at::Tensor tensor;
  ParameterTraits traits;
  bool trainable = true;
  ParallelLinear* in_fp8 = nullptr;  ///< whose weight it is, when it is FP8 codes (fp8_param)
};

class Bucket {
 public:
  struct Entry {
    const ManagedParameter* parameter;
    int64_t offset = 0;  ///< of its first element in the bucket
    int64_t elements() const { return parameter->tensor.numel(); }
  };

  /// Moves the parameters' values into a flat buffer; the tensor objects stay the same.
  Bucket(const BucketLayout& layout, const std::vector<const ManagedParameter*>& items, Group group, Sharding sharding,
         at::ScalarType grad_dtype);

  const std::vector<Entry>& entries() const { return entries_; }
  const Group& group() const { return group_; }
  bool trainable() const { return grad_shard_.defined(); }
  bool sharded() const { return sharding_ != Sharding::kNone; }
  int64_t begin() const { return begin_; }  ///< this rank's share
  int64_t end() const { return begin_ + shard_elements_; }
  const at::Tensor& param_shard() const { return param_shard_; }  ///< [begin, end) of the parameters
  const at::Tensor& grad_shard() const { return grad_shard_; }    ///< the same of reduced gradients

  // Gradients. Without sharding of gradients each parameter's share of the flat buffer is `grad_view`.
  /// Before the step's first backward: marked so that the first contribution overwrites what is there; sharded: zero.
  void zero_gradients();
  at::Tensor grad_view(const Entry& entry) const;
  /// Adds what autograd left in the parameter's .grad, if anything, and drops that.
  void take(const Entry& entry);
  /// Whether a hook of autograd's announces a contribution: not when a layer has put its weight gradient aside.
  bool contributed(const Entry& entry);
  /// Layers may add to the buffer themselves (layers/main_gradient.h), as long as these are registered.
  void register_main_gradients(bool on);
  void start_reduce();
  void finish_reduce();

  // Parameters.
  void start_gather();   ///< fills the flat buffer from all shards
  void finish_gather();  ///< the parameters are in place after this
  bool in_place() const { return in_place_ && !gathering_; }
  /// Gives the memory of the gathered parameters back (kParameters only).
  void release();
  /// After parameters were written from outside: the shard follows.
  void take_over();
  /// Bytes this rank keeps all the time: parameters, gradients.
  int64_t param_bytes() const { return sharding_ == Sharding::kParameters ? param_shard_.nbytes() : params_.nbytes(); }
  int64_t grad_bytes() const;

 private:
  bool shards_gradients() const { return sharding_ >= Sharding::kGradients; }

  Group group_;
  Sharding sharding_;
  std::vector<Entry> entries_;
  int64_t elements_ = 0, shard_elements_ = 0, begin_ = 0;
  at::Tensor params_, param_shard_, grads_, grad_shard_;
  at::TensorOptions grad_options_;
  std::vector<std::shared_ptr<MainGradient>> main_;  ///< by entry; empty when gradients are sharded
  at::Tensor reduced_;                               ///< this rank's part of a reduction under way (sharded gradients)
  std::shared_ptr<Group::Pending> reducing_, gathering_;
  bool reduce_started_ = false, in_place_ = true;
};

}  // namespace mcore_bridge
