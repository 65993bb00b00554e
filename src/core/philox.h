// Philox4x32-10: a counter-based random generator (Salmon et al., SC 2011, https://doi.org/10.1145/2063384.2063405).
// Any element's number can be computed alone, so initialisation does not depend on how a tensor is split.
#pragma once

#include <array>
#include <cstdint>

namespace mcore_bridge {

using PhiloxBlock = std::array<uint32_t, 4>;

inline PhiloxBlock philox(PhiloxBlock counter, uint64_t key) {
  constexpr uint64_t kMultiply0 = 0xD2511F53, kMultiply1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  auto low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = kMultiply0 * counter[0], second = kMultiply1 * counter[2];
    counter = {static_cast<uint32_t>(second >> 32) ^ counter[1] ^ low, static_cast<uint32_t>(second),
               static_cast<uint32_t>(first >> 32) ^ counter[3] ^ high, static_cast<uint32_t>(first)};
    low += kWeyl0;
    high += kWeyl1;
  }
  return counter;
}

}  // namespace mcore_bridge
