// The tensors of a checkpoint by what they mean: a quantised weight and its scales are one. Works on any model.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bridge/tensor_source.h"

namespace mcore_bridge {

struct LogicalTensor {
  std::string name;
  std::vector<int64_t> shape;
  QuantMethod method = QuantMethod::kNone;             ///< how it is stored
  std::vector<const CheckpointReader::Tensor*> parts;  ///< the tensors in the files, the weight before its scales
  std::vector<std::string> part_names;
  std::shared_ptr<const TensorSource> source;  ///< null when it holds no floating point numbers
  int64_t rows = 1, cols = 1;                  ///< as a matrix whose columns are the last dimension

  uint64_t bytes() const;  ///< in the files
  /// Rows [first, first + count) as float; several threads may. Needs a source.
  void read(int64_t first, int64_t count, std::vector<float>& to) const;
};

/// In the order of the files. With `quantized` false every tensor in the files stands for itself. ValueError when
/// scales have no weight or do not fit it.
std::vector<LogicalTensor> logical_tensors(const CheckpointReader& reader, const Quantization& quantization,
                                           bool quantized = true);

}  // namespace mcore_bridge
