#include "parallel/parallel_state.h"

#include <algorithm>

#include "mcore_bridge/error.h"
#include "plan/plan.h"

namespace mcore_bridge {

ParallelStatePtr ParallelState::single() {
  static const ParallelStatePtr state = create(Topology{}, 0, {});
  return state;
}

ParallelStatePtr ParallelState::create(const Topology& topology, int rank, const std::map<GroupKind, Group>& groups) {
  auto state = std::make_shared<ParallelState>();
  state->topology = topology;
  state->rank = rank;
  state->place = topology.coordinates(rank);
  auto take = [&](GroupKind kind) {
    const auto ranks = topology.group_of(kind, rank);
    const auto found = groups.find(kind);
    if (found != groups.end()) {
      MCB_CHECK(found->second.ranks() == ranks || ranks.empty(), "ParallelState: the ", group_name(kind),
                " group does not hold the ranks that the layout gives it");
      return found->second;
    }
    MCB_CHECK(ranks.size() <= 1, "ParallelState: rank ", rank, " has no ", group_name(kind),
              " group, but the layout puts it with ", ranks.size() - 1,
              " others; call initialize_model_parallel after torch.distributed.init_process_group");
    // Alone, but not rank 0: who asks for the members must find this rank.
    return ranks.empty() ? Group{} : Group::planned(ranks, 0);
  };
  state->tp = take(GroupKind::kTensor);
  state->cp = take(GroupKind::kContext);
  state->dp = take(GroupKind::kData);
  state->dp_cp = take(GroupKind::kDataContext);
  state->pp = take(GroupKind::kPipeline);
  state->pp_back = take(GroupKind::kPipelineBack);
  state->model = take(GroupKind::kModel);
  state->tp_cp = take(GroupKind::kTensorContext);
  state->embedding = take(GroupKind::kEmbedding);
  state->ep = take(GroupKind::kExpert);
  state->etp = take(GroupKind::kExpertTensor);
  state->edp = take(GroupKind::kExpertData);
  state->world = take(GroupKind::kWorld);
  return state;
}

ParallelStatePtr ParallelState::planned(const Topology& topology, int rank) {
  std::map<GroupKind, Group> groups;
  for (const auto kind : all_group_kinds()) {
    auto ranks = topology.group_of(kind, rank);
    const auto place = std::find(ranks.begin(), ranks.end(), rank);
    if (place == ranks.end()) continue;
    const auto index = static_cast<int>(place - ranks.begin());
    groups.emplace(kind, Group::planned(std::move(ranks), index));
  }
  return create(topology, rank, groups);
}

SplitRanks ParallelState::split_ranks() const { return {tp.rank(), tp.size(), etp.rank(), etp.size()}; }

}  // namespace mcore_bridge
