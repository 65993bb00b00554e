// The groups of one rank, made by Python (or absent on one rank) and handed to everything that communicates.
#pragma once

#include <map>
#include <memory>

#include "mcore_bridge/topology.h"
#include "parallel/group.h"

namespace mcore_bridge {

struct SplitRanks;

struct ParallelState {
  Topology topology;
  int rank = 0;
  RankCoordinates place;
  Group tp, cp, dp, dp_cp, pp, pp_back, model, tp_cp, embedding, ep, etp, edp, world;

  /// One rank, no groups.
  static std::shared_ptr<const ParallelState> single();
  /// `groups` holds the group of each kind this rank belongs to; kinds of one rank may be absent.
  static std::shared_ptr<const ParallelState> create(const Topology& topology, int rank,
                                                     const std::map<GroupKind, Group>& groups);

  /// Any rank of any layout on paper, for planning: groups have their members but cannot communicate.
  static std::shared_ptr<const ParallelState> planned(const Topology& topology, int rank);

  /// The group for messages from pipeline rank `from` to `to`: one per direction, so that neither waits for the other.
  const Group& way(int from, int to) const { return from < to ? pp : pp_back; }
  /// The ranks that hold the same of a parameter: experts have replicas of their own.
  const Group& replicas(bool expert) const { return expert ? edp : dp_cp; }
  SplitRanks split_ranks() const;  ///< places of this rank among those a matrix is split over (plan/plan.h)
  bool is_first_stage() const { return place.pp == 0; }
  bool is_last_stage() const { return place.pp == topology.sizes().pipeline - 1; }
};

using ParallelStatePtr = std::shared_ptr<const ParallelState>;

}  // namespace mcore_bridge
