// How the tensors of the model become tensors of a file. Saving knows nothing else about a format.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "bridge/checkpoint_plan.h"
#include "bridge/shard_layout.h"
#include "bridge/shard_writer.h"
#include "bridge/tensor_source.h"
#include "parallel/group.h"

namespace mcore_bridge {

/// What an unencoded tensor is kept in when the model's others are kept in `dtype`.
inline c10::ScalarType plain_dtype(const HfTensor& tensor, c10::ScalarType dtype) {
  return tensor.float32 ? c10::ScalarType::Float : dtype;
}

class TensorEncoder {
 public:
  virtual ~TensorEncoder() = default;
  /// The tensors of the file that hold `tensor`, e.g. a weight and its scales. A function of names and shapes alone:
  /// all ranks get the same.
  virtual std::vector<StoredTensor> stored(const HfTensor& tensor) const = 0;
  /// Called once before any write(), on all ranks of the model-parallel group of one data-parallel replica, with what
  /// this rank holds: the place to agree on what several ranks share (scales of blocks that a split cuts).
  virtual void prepare(const std::vector<PlannedParameter>& parameters, const Group& model) {}
  /// Regions are cut into blocks at multiples of this many rows of the tensor as it would be stored unencoded.
  virtual int64_t row_block(const HfTensor& tensor) const { return 1; }
  /// Writes what the values of `box` become. `values`: CPU, contiguous, the box's rows one after the other, the
  /// parameter's dtype.
  /// Called from several threads at once.
  virtual void write(const HfTensor& tensor, const Box& box, const at::Tensor& values, ShardWriter& writer) const = 0;
};

/// Every tensor under its own name as `dtype`.
std::unique_ptr<TensorEncoder> plain_encoder(c10::ScalarType dtype);

}  // namespace mcore_bridge
