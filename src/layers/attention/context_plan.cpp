#include "layers/attention/context_plan.h"

#include <ATen/ATen.h>

#include "parallel/zigzag.h"

namespace mcore_bridge {

Transport parse_transport(const std::string& name) {
  return name == "a2a" ? Transport::kAllToAll : name == "all_gather" ? Transport::kAllGather : Transport::kRing;
}

ContextPlanPtr context_plan(const Group& group, Transport transport, std::vector<int64_t> ends, int64_t window,
                            c10::Device device) {
  auto plan = std::make_shared<ContextPlan>();
  plan->group = group;
  plan->transport = transport;
  plan->ends = std::move(ends);
  const int size = group.size(), rank = group.rank();
  auto sets = [&](int64_t left) {
    std::vector<TileSet> result;
    if (transport == Transport::kRing) {
      for (int step = 0; step < size; ++step) {
        result.emplace_back(ring_tiles(plan->ends, size, rank, (rank - step + size) % size, left), device);
      }
    } else if (transport == Transport::kAllGather) {
      result.emplace_back(gathered_tiles(plan->ends, size, rank, left), device);
    }
    return result;
  };
  plan->full = sets(-1);
  if (window >= 0) plan->windowed = sets(window);
  if (transport != Transport::kRing && size > 1) {
    const auto order = zigzag_order(plan->ends, size);
    std::vector<int64_t> inverse(order.size());
    for (size_t i = 0; i < order.size(); ++i) inverse[static_cast<size_t>(order[i])] = static_cast<int64_t>(i);
    plan->natural = at::tensor(order, at::kLong).to(device);
    plan->rank_major = at::tensor(inverse, at::kLong).to(device);
  }
  return plan;
}

}  // namespace mcore_bridge
