// Floating point numbers as files hold them, to and from float.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace mcore_bridge {

/// F64, F32, F16, BF16, F8_E4M3, F8_E5M2 and F8_E8M0 can be read; all but the last can be written, rounded to nearest
/// even (what is too large for F8_E4M3 becomes NaN: scale first).
bool is_float_dtype(c10::ScalarType dtype);
void to_float(c10::ScalarType dtype, const void* from, float* to, int64_t count);
void from_float(c10::ScalarType dtype, const float* from, void* to, int64_t count);

}  // namespace mcore_bridge
