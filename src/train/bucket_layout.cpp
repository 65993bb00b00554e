#include "train/bucket_layout.h"

#include <algorithm>
#include <map>
#include <utility>

namespace mcore_bridge {
namespace {

constexpr int64_t kAlignment = 64;  // elements; vector loads and matrix kernels want aligned starts

int64_t aligned(int64_t elements, int64_t to = kAlignment) { return (elements + to - 1) / to * to; }

/// One after the other; a shard may begin anywhere.
BucketLayout in_a_row(std::vector<int> members, const std::vector<LayoutItem>& items) {
  BucketLayout result{.shards = items[members[0]].shards};
  std::stable_sort(members.begin(), members.end(), [&](int a, int b) { return items[a].order < items[b].order; });
  for (const int item : members) {
    result.slots.push_back({item, result.elements});
    result.elements += aligned(items[item].elements);
  }
  result.elements = aligned(result.elements, kAlignment * result.shards);
  return result;
}

/// Each item inside one shard, the largest first into the shard that holds least.
BucketLayout by_shard(std::vector<int> members, const std::vector<LayoutItem>& items) {
  BucketLayout result{.shards = items[members[0]].shards};
  std::stable_sort(members.begin(), members.end(), [&](int a, int b) { return items[a].elements > items[b].elements; });
  std::vector<int64_t> filled(result.shards);
  std::vector<std::vector<int>> shards(result.shards);
  for (const int item : members) {
    const auto least = std::min_element(filled.begin(), filled.end()) - filled.begin();
    shards[least].push_back(item);
    filled[least] += aligned(items[item].elements);
  }
  const auto size = *std::max_element(filled.begin(), filled.end());
  for (size_t shard = 0; shard < shards.size(); ++shard) {
    auto at = static_cast<int64_t>(shard) * size;
    std::stable_sort(shards[shard].begin(), shards[shard].end(),
                     [&](int a, int b) { return items[a].order < items[b].order; });
    for (const int item : shards[shard]) {
      result.slots.push_back({item, at});
      at += aligned(items[item].elements);
    }
  }
  result.elements = size * result.shards;
  return result;
}

}  // namespace

std::vector<BucketLayout> layout_buckets(const std::vector<LayoutItem>& items, int64_t bucket_elements) {
  std::map<int, int64_t> largest;
  for (const auto& item : items) largest[item.key] = std::max(largest[item.key], item.elements);
  // So many whole items that shards fill evenly.
  constexpr int64_t kPerShard = 4;
  auto limit = [&](const LayoutItem& item) {
    return item.whole ? std::max(bucket_elements, kPerShard * item.shards * largest[item.key]) : bucket_elements;
  };
  std::map<int, std::vector<int>> open;
  std::vector<std::vector<int>> closed;
  for (int item = static_cast<int>(items.size()) - 1; item >= 0; --item) {
    auto& members = open[items[item].key];
    int64_t held = 0;
    for (const int other : members) held += items[other].elements;
    if (!members.empty() && held + items[item].elements > limit(items[item]))
      closed.push_back(std::exchange(members, {}));
    members.push_back(item);
  }
  for (auto& [key, members] : open) closed.push_back(std::move(members));
  // A bucket is complete when the first of its items in forward order is.
  std::sort(closed.begin(), closed.end(), [](const auto& a, const auto& b) { return a.back() > b.back(); });
  std::vector<BucketLayout> result;
  for (auto& members : closed) {
    result.push_back(items[members[0]].whole ? by_shard(std::move(members), items)
                                             : in_a_row(std::move(members), items));
  }
  return result;
}

}  // namespace mcore_bridge
