// How a model's weights are quantised, by its config.json.
#pragma once

#include <cstdint>
#include <string>

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

enum class QuantMethod { kNone, kFp8, kMxfp4 };

/// Rows and columns of a block of a weight that shares one scale.
struct BlockSize {
  int64_t rows = 128, cols = 128;
  bool operator==(const BlockSize&) const = default;
};

struct Quantization {
  QuantMethod method = QuantMethod::kNone;
  BlockSize block;  ///< kFp8
};

/// Reads `quantization_config` (or `compression_config`) of config.json's content, also inside text_config. ValueError
/// names a method this version does not read and what to do. fp8 without weight_block_size has one scale per tensor.
Quantization read_quantization(const Json& config);

/// Throws the ValueError of a method that is not read. `what`: its name; `advice`: what to do instead.
[[noreturn]] void refuse_quantization(const std::string& where, const std::string& what, const std::string& advice);

}  // namespace mcore_bridge
