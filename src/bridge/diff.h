// Two checkpoints compared tensor by tensor, with bounded memory.
#pragma once

#include <functional>
#include <string>

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

struct DiffOptions {
  /// Quantised weights are compared by the values they stand for; otherwise every tensor in the files for itself.
  bool dequantize = false;
  std::function<void(uint64_t done, uint64_t total)> progress;  ///< bytes of both sides
};

/// {tensors: [{name, shape, dtype_a, dtype_b, identical, max_abs, relative}], missing: names only A has, extra: names
/// only B has, wrong_shape: [{name, a, b}]}. `relative` is |a - b| / |a| (Frobenius); a NaN or Inf on one side alone
/// gives null for both numbers, which stands for infinity. `identical`: the same values bit for bit after widening.
/// Tensors of whole numbers have identical only.
Json diff_checkpoints(const std::string& a, const std::string& b, const DiffOptions& options);

}  // namespace mcore_bridge
