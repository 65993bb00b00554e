#include "layers/attention/tile.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "parallel/zigzag.h"

namespace mcore_bridge {
namespace {

using Pairs = std::multiset<std::pair<int64_t, int64_t>>;

void see(const std::vector<Tile>& tiles, const std::vector<int64_t>& q_position, const std::vector<int64_t>& k_position,
         Pairs& pairs) {
  for (const auto& tile : tiles) {
    bool hides = false;
    for (int64_t i = 0; i < tile.q_count; ++i) {
      int64_t seen = 0;
      for (int64_t j = 0; j < tile.k_count; ++j) {
        const auto apart = tile.distance + i - j;
        const bool hidden = (tile.causal && apart < 0) || (tile.windowed && apart > tile.window);
        hides = hides || hidden;
        if (hidden) continue;
        ++seen;
        pairs.emplace(q_position[static_cast<size_t>(tile.q_first + i)],
                      k_position[static_cast<size_t>(tile.k_first + j)]);
      }
      EXPECT_GT(seen, 0) << "a row without keys";
    }
    EXPECT_EQ(hides, tile.causal || tile.windowed) << "a mask that hides nothing, or one that is missing";
  }
}

Pairs wanted(const std::vector<int64_t>& ends, const std::vector<int64_t>& queries, int64_t window) {
  Pairs pairs;
  for (const auto q : queries) {
    const auto start = *std::prev(std::upper_bound(ends.begin(), ends.end(), q));
    for (auto k = window < 0 ? start : std::max(start, q - window); k <= q; ++k) pairs.emplace(q, k);
  }
  return pairs;
}

std::vector<int64_t> positions(const std::vector<int64_t>& ends, int cp, int rank) {
  std::vector<int64_t> result;
  for (const auto& span : zigzag_spans(ends, cp, rank)) {
    for (int64_t i = 0; i < span.count; ++i) result.push_back(span.first + i);
  }
  return result;
}

}  // namespace

TEST(Tile, VisibleIsTheSmallestRectangle) {
  for (int64_t queries = 1; queries <= 4; ++queries) {
    for (int64_t keys = 1; keys <= 4; ++keys) {
      for (int64_t distance = -5; distance <= 6; ++distance) {
        for (int64_t window = -1; window <= 5; ++window) {
          auto sees = [&](int64_t i, int64_t j) {
            const auto apart = distance + i - j;
            return apart >= 0 && (window < 0 || apart <= window);
          };
          std::set<int64_t> rows, columns;
          bool all = true;
          for (int64_t i = 0; i < queries; ++i) {
            for (int64_t j = 0; j < keys; ++j) {
              if (!sees(i, j)) continue;
              rows.insert(i);
              columns.insert(j);
            }
          }
          for (const auto i : rows) {
            for (const auto j : columns) all = all && sees(i, j);
          }
          const auto tile = visible({.q_first = 10,
                                     .q_count = queries,
                                     .k_first = 20,
                                     .k_count = keys,
                                     .distance = distance,
                                     .window = window});
          ASSERT_EQ(tile.has_value(), !rows.empty());
          if (!tile) continue;
          EXPECT_EQ(tile->q_first, 10 + *rows.begin());
          EXPECT_EQ(tile->q_count, static_cast<int64_t>(rows.size()));
          EXPECT_EQ(tile->k_first, 20 + *columns.begin());
          EXPECT_EQ(tile->k_count, static_cast<int64_t>(columns.size()));
          EXPECT_EQ(tile->causal || tile->windowed, !all);
        }
      }
    }
  }
}

/// Every query sees exactly its own document's keys up to itself and within the window, each once, over all ring steps.
TEST(Tile, RingAndGatherSeeEveryVisiblePairOnce) {
  for (const int cp : {1, 2, 3, 4}) {
    const std::vector<std::vector<int64_t>> rows = {{0, 12L * cp}, {0, 4L * cp, 4L * cp, 10L * cp, 20L * cp}};
    for (const auto& ends : rows) {
      std::vector<int64_t> natural(static_cast<size_t>(ends.back()));
      for (size_t i = 0; i < natural.size(); ++i) natural[i] = static_cast<int64_t>(i);
      for (const int64_t window : {-1, 0, 1, 3, 5, 8, 13, 1000}) {
        for (int rank = 0; rank < cp; ++rank) {
          const auto mine = positions(ends, cp, rank);
          const auto expected = wanted(ends, mine, window);
          Pairs ring, gathered;
          for (int source = 0; source < cp; ++source)
            see(ring_tiles(ends, cp, rank, source, window), mine, positions(ends, cp, source), ring);
          see(gathered_tiles(ends, cp, rank, window), mine, natural, gathered);
          EXPECT_EQ(ring, expected) << "cp " << cp << " rank " << rank << " window " << window;
          EXPECT_EQ(gathered, expected) << "cp " << cp << " rank " << rank << " window " << window;
        }
      }
    }
  }
}

/// Zigzag: every rank scores equally many pairs in every step after its own.
TEST(Tile, CausalWorkIsBalanced) {
  const int cp = 4;
  const std::vector<int64_t> ends = {0, 64, 96};
  auto work = [&](int rank, int step) {
    int64_t pairs = 0;
    for (const auto& tile : ring_tiles(ends, cp, rank, (rank - step + cp) % cp, -1))
      pairs += tile.q_count * tile.k_count;
    return pairs;
  };
  for (int step = 0; step < cp; ++step) {
    for (int rank = 1; rank < cp; ++rank) EXPECT_EQ(work(rank, step), work(0, step));
  }
  EXPECT_EQ(2 * work(0, 1), work(0, 0));
}

TEST(Zigzag, OrderAndErrors) {
  const std::vector<int64_t> ends = {0, 8, 16};
  EXPECT_EQ(positions(ends, 2, 0), (std::vector<int64_t>{0, 1, 6, 7, 8, 9, 14, 15}));
  EXPECT_EQ(positions(ends, 2, 1), (std::vector<int64_t>{2, 3, 4, 5, 10, 11, 12, 13}));
  const auto order = zigzag_order(ends, 2);
  EXPECT_EQ(order[6], 2);
  EXPECT_EQ(order[2], 8);
  EXPECT_NO_THROW(check_zigzag(ends, 2, "x"));
  EXPECT_THROW(check_zigzag({0, 8, 18}, 2, "x"), std::exception);
}

}  // namespace mcore_bridge
