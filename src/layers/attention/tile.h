// Which queries see which keys, as rectangles. Pure arithmetic.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace mcore_bridge {

/// Queries [q_first, q_first + q_count) against keys [k_first, k_first + k_count), rows of the tensors at hand. Query i
/// and key j of the tile (counted from its first ones) are `distance + i - j` positions apart.
struct Tile {
  int64_t q_first = 0, q_count = 0, k_first = 0, k_count = 0;
  int64_t distance = 0;
  int64_t window = -1;    ///< keys to the left that a query sees besides its own; -1: all
  bool causal = false;    ///< some keys lie behind some queries: j is hidden where distance + i - j < 0
  bool windowed = false;  ///< some keys lie before some windows: j is hidden where distance + i - j > window

  bool operator==(const Tile&) const = default;
};

/// The smallest tile that holds everything visible in `tile`, with its flags set; every row of it sees a key. nullopt:
/// nothing is visible.
std::optional<Tile> visible(Tile tile);

/// Tiles of one ring step: `rank`'s queries against the keys of `source`, both in local (zigzag) order. `ends`: the
/// documents of the whole row, each a multiple of 2 * cp.
std::vector<Tile> ring_tiles(const std::vector<int64_t>& ends, int cp, int rank, int source, int64_t window);

/// `rank`'s queries in local order against the keys of the whole row in natural order.
std::vector<Tile> gathered_tiles(const std::vector<int64_t>& ends, int cp, int rank, int64_t window);

}  // namespace mcore_bridge
