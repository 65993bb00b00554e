// Fills parameters from the tensors of a checkpoint, each byte read once, in the order of the files.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bridge/block_loader.h"
#include "bridge/checkpoint_plan.h"
#include "bridge/tensor_source.h"

namespace mcore_bridge {

/// By Hugging Face name.
using Sources = std::map<std::string, std::shared_ptr<const TensorSource>>;

/// Parameters that are FP8 codes take those of a checkpoint whose blocks are theirs as they are; others are read as
/// values, some at a time, and quantised.
class ParameterReader {
 public:
  /// What is given must outlive it. Parts of parameters that have no source are left alone.
  ParameterReader(const Sources& sources, const std::vector<PlannedParameter>& parameters, const Progress& progress);

  /// Adds the bytes needed to the report. Collective over `tp` when there are parameters that are FP8 codes.
  void run(const Group& tp, LoadReport& report);

 private:
  /// A part of a parameter and where it comes from.
  struct Block {
    const TensorSource* source;
    Box box;
    at::Tensor target;
    TensorSource::Position position;
    int64_t work;  ///< bytes, for the progress
  };
  /// A parameter that is FP8 codes, read: its values, or undefined when the codes are there and want their scales.
  struct InFp8 {
    const PlannedParameter* parameter;
    at::Tensor values;
  };

  /// Reads parameters [first, last) and returns those that are FP8 codes.
  std::vector<InFp8> read(size_t first, size_t last, LoadReport& report);
  bool takes_codes(const PlannedParameter& parameter) const;
  /// Where a parameter that is FP8 codes is read to: the codes, or values; undefined when the checkpoint has none of
  /// it.
  at::Tensor target_of(const PlannedParameter& parameter) const;
  void add_blocks(std::vector<Block>& blocks, const PlannedParameter& parameter, const at::Tensor& target,
                  LoadReport& report) const;
  /// Makes codes of what was read, or gives those that were read their scales.
  void settle(const InFp8& read) const;

  const Sources& sources_;
  const std::vector<PlannedParameter>& parameters_;
  const Progress& progress_;
  std::vector<BlockLoader> loaders_;
  std::atomic<int64_t> done_ = 0;
  int64_t work_ = 0;  ///< bytes of the parameters' values to be filled
};

}  // namespace mcore_bridge
