// MXFP4 as gpt-oss publishes its experts: `<name>_blocks` uint8 [experts, rows, groups, 16] and `<name>_scales` uint8
// [experts, rows, groups]. A group is 32 numbers along the inputs, two e2m1 codes to a byte (the first in the low four
// bits), times 2^(scale - 127). The weight they stand for is kept transposed, [experts, 32 * groups, rows]. Format: OCP
// Microscaling Formats (MX) v1.0.
#pragma once

#include <cstdint>

namespace mcore_bridge {

constexpr int64_t kMxGroup = 32, kMxGroupBytes = 16;

/// One group's 32 numbers.
void decode_mxfp4(const uint8_t* bytes, uint8_t scale, float* to);

/// The group's bytes and scale: 2^ceil(log2(amax / 6)), the smallest at which nothing is cut off (as the kernels
/// Transformers quantises gpt-oss with choose it), codes rounded to nearest, ties to even. What was decoded is encoded
/// without change of value. Returns false when a number is not finite.
bool encode_mxfp4(const float* from, uint8_t* bytes, uint8_t& scale);

}  // namespace mcore_bridge
