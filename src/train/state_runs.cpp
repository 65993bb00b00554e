#include "train/state_runs.h"

#include <algorithm>
#include <cmath>

namespace mcore_bridge {

std::vector<StateRun> state_runs(const std::vector<StateSlot>& slots, int64_t begin, int64_t end, int64_t& to_offload) {
  std::vector<StateRun> result;
  StateRun open;
  auto close = [&] {
    if (open.end == open.begin) return;
    // The part for host memory comes first.
    const auto host = slots[open.first].whole ? 0 : std::min(to_offload, open.end - open.begin);
    to_offload -= host;
    const auto cut = open.begin + host;
    if (host > 0) result.push_back({open.begin, cut, open.first, /*on_host=*/true});
    if (cut < open.end) result.push_back({cut, open.end, open.first});
  };
  for (size_t i = 0; i < slots.size(); ++i) {
    const auto first = std::max(slots[i].offset, begin), last = std::min(slots[i].offset + slots[i].elements, end);
    if (first >= last) continue;
    if (open.end == open.begin || slots[i].kind != slots[open.first].kind) {
      close();
      open = {.begin = first, .first = i};
    }
    open.end = last;
  }
  close();
  return result;
}

int64_t offloaded_elements(double fraction, int64_t elements) {
  return std::llround(fraction * static_cast<double>(elements));
}

}  // namespace mcore_bridge
