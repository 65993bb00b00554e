#include "layers/attention/tile.h"

#include <algorithm>

namespace mcore_bridge {
namespace {

constexpr int64_t kNone = -1;

/// A window that reaches the start of the document from its end hides nothing.
int64_t effective_window(int64_t window, int64_t length) { return window >= length - 1 ? kNone : window; }

bool masked(const Tile& tile) { return tile.causal || tile.windowed; }

/// Appends the visible part of `tile`, joined with the one before where both hide nothing and touch.
void append(std::vector<Tile>& tiles, const Tile& whole) {
  const auto tile = visible(whole);
  if (!tile) return;
  if (!tiles.empty() && !masked(tiles.back()) && !masked(*tile)) {
    auto& last = tiles.back();
    const bool same_queries = last.q_first == tile->q_first && last.q_count == tile->q_count;
    const bool same_keys = last.k_first == tile->k_first && last.k_count == tile->k_count;
    if (same_queries && last.k_first + last.k_count == tile->k_first) {
      last.k_count += tile->k_count;
      return;
    }
    if (same_keys && last.q_first + last.q_count == tile->q_first) {
      last.q_count += tile->q_count;
      return;
    }
  }
  tiles.push_back(*tile);
}

}  // namespace

std::optional<Tile> visible(Tile tile) {
  const bool bounded = tile.window >= 0;
  // Rows that see a key: the first key must not lie behind them, the last not before their window.
  const auto first_row = std::max<int64_t>(0, -tile.distance);
  const auto rows = bounded ? std::min(tile.q_count, tile.k_count + tile.window - tile.distance) : tile.q_count;
  if (rows <= first_row || tile.k_count <= 0) return std::nullopt;
  tile.q_first += first_row;
  tile.q_count = rows - first_row;
  tile.distance += first_row;
  // Keys that some row sees.
  const auto first_key = bounded ? std::max<int64_t>(0, tile.distance - tile.window) : 0;
  const auto keys = std::min(tile.k_count, tile.distance + tile.q_count);
  tile.k_first += first_key;
  tile.k_count = keys - first_key;
  tile.distance -= first_key;
  tile.causal = tile.distance < tile.k_count - 1;
  tile.windowed = bounded && tile.distance + tile.q_count - 1 > tile.window;
  return tile;
}

std::vector<Tile> ring_tiles(const std::vector<int64_t>& ends, int cp, int rank, int source, int64_t window) {
  std::vector<Tile> tiles;
  for (size_t i = 0; i + 1 < ends.size(); ++i) {
    const auto length = ends[i + 1] - ends[i], chunk = length / (2 * cp), start = ends[i] / cp;
    const auto left = effective_window(window, length);
    if (rank == source && left == kNone) {
      // The two chunks in order: what lies between them is hidden from neither.
      append(tiles, {.q_first = start, .q_count = 2 * chunk, .k_first = start, .k_count = 2 * chunk});
      continue;
    }
    const int64_t queries[] = {rank, 2 * cp - 1 - rank}, keys[] = {source, 2 * cp - 1 - source};
    for (int half = 0; half < 2; ++half) {
      for (int other = 0; other < 2; ++other) {
        append(tiles, {.q_first = start + half * chunk,
                       .q_count = chunk,
                       .k_first = start + other * chunk,
                       .k_count = chunk,
                       .distance = (queries[half] - keys[other]) * chunk,
                       .window = left});
      }
    }
  }
  return tiles;
}

std::vector<Tile> gathered_tiles(const std::vector<int64_t>& ends, int cp, int rank, int64_t window) {
  std::vector<Tile> tiles;
  for (size_t i = 0; i + 1 < ends.size(); ++i) {
    const auto length = ends[i + 1] - ends[i];
    const int parts = cp == 1 ? 1 : 2;  // one rank has whole documents, of any length
    const auto chunk = length / (parts * cp);
    const int64_t queries[] = {rank, 2 * cp - 1 - rank};
    for (int half = 0; half < parts; ++half) {
      append(tiles, {.q_first = ends[i] / cp + half * chunk,
                     .q_count = chunk,
                     .k_first = ends[i],
                     .k_count = length,
                     .distance = queries[half] * chunk,
                     .window = effective_window(window, length)});
    }
  }
  return tiles;
}

}  // namespace mcore_bridge
