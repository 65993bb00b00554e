// From checkpoint to checkpoint without a model: casts, merges, shards anew, (de)quantises, a few blocks at a time.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bridge/formats/quantization.h"

namespace mcore_bridge {

struct ConvertOptions {
  std::string model;       ///< folder or safetensors file; any model type
  std::string output_dir;  ///< appears whole or stays as it was (AtomicFolder)
  /// Of the plain floating point tensors; scales, router corrections (e_score_correction_bias) and what the
  /// family of a known model type keeps in float32 keep theirs.
  std::optional<c10::ScalarType> dtype;
  bool dequantize = false;                    ///< quantised weights become plain ones (bfloat16 unless `dtype` says)
  QuantMethod quantize = QuantMethod::kNone;  ///< plain weights become quantised ones
  std::string adapter;                        ///< PEFT folder to merge; empty: none
  int64_t max_shard_bytes = 5'000'000'000;
  /// Files beside the weights: (name, content). config.json among them is changed to tell the dtype, the quantisation
  /// and whether the output layer is tied.
  std::vector<std::pair<std::string, std::string>> extra_files;
  /// Called on the calling thread about ten times a second with the bytes written so far and in all.
  std::function<void(uint64_t done, uint64_t total)> progress;
};

struct ConvertReport {
  uint64_t bytes_read = 0, bytes_written = 0;
  int64_t tensors = 0;  ///< written
  int64_t copied = 0;   ///< of these, byte for byte
  int64_t files = 0;
};

/// Memory in use does not depend on the model's size (a few blocks per thread, and the adapter); threads: io_threads().
/// Tensors that nothing changes keep their bytes, quantised ones with their scales. A merged weight that was quantised
/// is quantised again unless `dequantize`.
ConvertReport convert_checkpoint(const ConvertOptions& options);

}  // namespace mcore_bridge
