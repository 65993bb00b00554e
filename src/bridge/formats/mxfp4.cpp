#include "bridge/formats/mxfp4.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace mcore_bridge {
namespace {

constexpr float kCodes[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                              -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

/// Nearest code of a magnitude, ties to the even one.
uint8_t code_of(float size) {
  // Halves of the steps between neighbours; where a tie goes up, the next code is even.
  if (size <= 0.25f) return 0;
  if (size < 0.75f) return 1;
  if (size <= 1.25f) return 2;
  if (size < 1.75f) return 3;
  if (size <= 2.5f) return 4;
  if (size < 3.5f) return 5;
  if (size <= 5.0f) return 6;
  return 7;
}

}  // namespace

void decode_mxfp4(const uint8_t* bytes, uint8_t scale, float* to) {
  // 255 is no number in the format; infinity shows it.
  const float factor =
      scale == 255 ? std::numeric_limits<float>::infinity() : std::ldexp(1.0f, static_cast<int>(scale) - 127);
  for (int i = 0; i < kMxGroupBytes; ++i) {
    to[2 * i] = kCodes[bytes[i] & 15] * factor;
    to[2 * i + 1] = kCodes[bytes[i] >> 4] * factor;
  }
}

bool encode_mxfp4(const float* from, uint8_t* bytes, uint8_t& scale) {
  float amax = 0;
  for (int i = 0; i < kMxGroup; ++i) {
    const auto size = std::fabs(from[i]);
    if (!(size <= std::numeric_limits<float>::max())) return false;
    amax = std::max(amax, size);
  }
  int exponent = -127;
  if (amax > 0) {
    // amax / 6 = fraction * 2^exponent with fraction in [0.5, 1); in double, so that the quotient is not rounded over a
    // power of two.
    const double fraction = std::frexp(static_cast<double>(amax) / 6.0, &exponent);
    if (fraction == 0.5) --exponent;
  }
  exponent = std::clamp(exponent, -127, 127);
  scale = static_cast<uint8_t>(exponent + 127);
  for (int i = 0; i < kMxGroupBytes; ++i) {
    uint8_t byte = 0;
    for (int half = 0; half < 2; ++half) {
      const auto value = from[2 * i + half];
      const auto size = static_cast<float>(std::ldexp(std::fabs(static_cast<double>(value)), -exponent));
      byte |= static_cast<uint8_t>((code_of(size) | (std::signbit(value) ? 8 : 0)) << (4 * half));
    }
    bytes[i] = byte;
  }
  return true;
}

}  // namespace mcore_bridge
