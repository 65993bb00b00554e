#include "bridge/formats/float_bytes.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Float8_e5m2.h>
#include <c10/util/Float8_e8m0fnu.h>
#include <c10/util/Half.h>

#include <array>
#include <cstring>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

template <class T>
void widen(const void* from, float* to, int64_t count) {
  const auto* values = static_cast<const T*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(values[i]);
}

/// One-byte numbers through a table of all 256.
template <class T>
void look_up(const void* from, float* to, int64_t count) {
  static const auto table = [] {
    std::array<float, 256> result{};
    for (int i = 0; i < 256; ++i) result[i] = static_cast<float>(T(static_cast<uint8_t>(i), T::from_bits()));
    return result;
  }();
  const auto* values = static_cast<const uint8_t*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = table[values[i]];
}

template <class T>
void narrow(const float* from, void* to, int64_t count) {
  auto* values = static_cast<T*>(to);
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(from[i]);
}

}  // namespace

bool is_float_dtype(c10::ScalarType dtype) {
  using enum c10::ScalarType;
  return dtype == Double || dtype == Float || dtype == Half || dtype == BFloat16 || dtype == Float8_e4m3fn ||
         dtype == Float8_e5m2 || dtype == Float8_e8m0fnu;
}

void to_float(c10::ScalarType dtype, const void* from, float* to, int64_t count) {
  using enum c10::ScalarType;
  switch (dtype) {
    case Float:
      std::memcpy(to, from, static_cast<size_t>(count) * 4);
      return;
    case Double:
      return widen<double>(from, to, count);
    case Half:
      return widen<c10::Half>(from, to, count);
    case BFloat16:
      return widen<c10::BFloat16>(from, to, count);
    case Float8_e4m3fn:
      return look_up<c10::Float8_e4m3fn>(from, to, count);
    case Float8_e5m2:
      return look_up<c10::Float8_e5m2>(from, to, count);
    case Float8_e8m0fnu:
      return look_up<c10::Float8_e8m0fnu>(from, to, count);
    default:
      fail("reading ", c10::toString(dtype), " as floating point numbers is not supported");
  }
}

void from_float(c10::ScalarType dtype, const float* from, void* to, int64_t count) {
  using enum c10::ScalarType;
  switch (dtype) {
    case Float:
      std::memcpy(to, from, static_cast<size_t>(count) * 4);
      return;
    case Double:
      return narrow<double>(from, to, count);
    case Half:
      return narrow<c10::Half>(from, to, count);
    case BFloat16:
      return narrow<c10::BFloat16>(from, to, count);
    case Float8_e4m3fn:
      return narrow<c10::Float8_e4m3fn>(from, to, count);
    case Float8_e5m2:
      return narrow<c10::Float8_e5m2>(from, to, count);
    default:
      fail("writing floating point numbers as ", c10::toString(dtype), " is not supported");
  }
}

}  // namespace mcore_bridge
