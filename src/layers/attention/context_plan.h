// What context-parallel attention must know of a micro-batch: made once, used by every layer.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "layers/attention/tile_attention.h"
#include "parallel/parallel_state.h"

namespace mcore_bridge {

/// How keys and values reach the queries of other context-parallel ranks.
enum class Transport {
  kRing,       ///< "p2p": they travel from rank to rank while the ones at hand are worked on
  kAllGather,  ///< "all_gather": every rank collects all of them
  kAllToAll    ///< "a2a": ranks swap sequence for heads, so that each sees whole sequences of its heads
};
/// Of a cp_comm_type that ModelConfig::finalize accepted.
Transport parse_transport(const std::string& cp_comm_type);

struct ContextPlan {
  Group group;
  Transport transport = Transport::kRing;
  std::vector<int64_t> ends;  ///< documents of the whole row, as cu_seqlens
  /// kRing: one set per step, step i against the keys of rank - i. kAllGather: one set, against keys in natural order.
  std::vector<TileSet> full, windowed;
  at::Tensor
      natural;  ///< int64, undefined with one rank: takes rows of all ranks, laid one after another, into natural order
  at::Tensor rank_major;  ///< the way back

  const std::vector<TileSet>& tiles(bool window) const { return window ? windowed : full; }
};
using ContextPlanPtr = std::shared_ptr<const ContextPlan>;

/// `window`: of the layers that have one, else -1.
ContextPlanPtr context_plan(const Group& group, Transport transport, std::vector<int64_t> ends, int64_t window,
                            c10::Device device);

}  // namespace mcore_bridge
