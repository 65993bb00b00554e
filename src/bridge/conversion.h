// What becomes of one tensor of a checkpoint that is converted.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "bridge/convert.h"
#include "bridge/logical_tensors.h"
#include "bridge/lora_merge.h"
#include "bridge/shard_writer.h"

namespace mcore_bridge {

/// A tensor, where its values come from, how it is stored in the end.
struct Conversion {
  LogicalTensor from;
  const LoraMerge* merge = nullptr;  ///< adds to the values
  bool copy = false;                 ///< the bytes of `from` as they are
  QuantMethod method = QuantMethod::kNone;
  c10::ScalarType dtype = c10::ScalarType::Undefined;  ///< when not quantised
  BlockSize block;                                     ///< of fp8

  std::vector<StoredTensor> stored() const;
};

/// One task: rows [first, first + count) of a conversion, or of a part's bytes when it is copied.
struct ConversionTask {
  const Conversion* conversion;
  size_t part = 0;
  int64_t first = 0, count = 0;
};

/// What becomes of every tensor, in the order of the files.
/// `kept`: names of tensors that no cast concerns.
std::vector<Conversion> plan_conversions(std::vector<LogicalTensor> tensors, const ConvertOptions& options,
                                         const Quantization& found, const LoraMerge* merge,
                                         const std::set<std::string>& kept);

/// Cuts a conversion into tasks of a few MiB.
void add_tasks(std::vector<ConversionTask>& tasks, const Conversion& conversion);

/// Returns the bytes written. NonFiniteError names a weight that cannot be quantised.
uint64_t run_task(const ConversionTask& task, ShardWriter& writer);

}  // namespace mcore_bridge
