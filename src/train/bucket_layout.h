// How parameters lie in flat buffers that ranks share out among themselves. Pure arithmetic.
#pragma once

#include <cstdint>
#include <vector>

namespace mcore_bridge {

struct LayoutItem {
  int64_t elements = 0;
  int shards = 1;      ///< ranks that share its bucket out
  int key = 0;         ///< items of different keys never share a bucket
  int order = 0;       ///< within a bucket, items of one order lie together
  bool whole = false;  ///< lies in one shard; alike for all items of a key
};

struct BucketLayout {
  struct Slot {
    int item = 0;
    int64_t offset = 0;
  };
  std::vector<Slot> slots;  ///< by offset
  int64_t elements = 0;     ///< padding included; the shards are equal parts of it
  int shards = 1;
};

/// Items are given in forward order. Buckets hold consecutive items of one key, at most `bucket_elements` of them
/// unless one alone is larger (or they are whole: then enough of them to fill the shards evenly), and come in the order
/// in which backward completes them. Slots and shards start at multiples of 64 elements. Every rank with the same items
/// gets the same layout.
std::vector<BucketLayout> layout_buckets(const std::vector<LayoutItem>& items, int64_t bucket_elements);

}  // namespace mcore_bridge
