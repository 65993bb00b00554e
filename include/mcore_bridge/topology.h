// Pure arithmetic of ranks: which rank sits where, and who belongs to which group. No torch, no communication.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace mcore_bridge {

/// Sizes of every parallel dimension. `data` is derived: world / (tensor * context * pipeline).
struct ParallelSizes {
  int tensor = 1;
  int pipeline = 1;
  int virtual_pipeline = 1;  ///< chunks of layers per pipeline rank
  int context = 1;
  int expert = 1;
  int expert_tensor = 1;
  int data = 1;

  int world() const { return tensor * context * data * pipeline; }
};

/// Where one rank sits. Dense layers use tp/cp/dp/pp; experts use etp/ep/edp/pp.
struct RankCoordinates {
  int tp = 0, cp = 0, dp = 0, pp = 0;
  int etp = 0, ep = 0, edp = 0;
  /// Ranks of one copy hold the whole model together, and no fewer do: tensor x pipeline, or as many as its experts
  /// need.
  int copy = 0;
};

/// The kinds of process groups a run needs; `group_name` gives their Megatron names.
enum class GroupKind {
  kTensor,
  kContext,
  kData,
  kDataContext,
  kPipeline,
  kPipelineBack /* the same ranks: what goes from a later to an earlier place */,
  kModel /* ranks of one RankCoordinates::copy */,
  kTensorContext,
  kEmbedding /* first and last stage */,
  kExpert,
  kExpertTensor,
  kExpertData,
  kWorld
};
const char* group_name(GroupKind kind);
const std::vector<GroupKind>& all_group_kinds();

/// The layout of a run in Megatron's default order, innermost first: tp-cp-ep-dp-pp.
class Topology {
 public:
  /// Throws ValueError when the sizes do not divide `world_size`; the text lists what does.
  Topology(ParallelSizes sizes, int world_size);
  Topology() : Topology(ParallelSizes{}, 1) {}

  const ParallelSizes& sizes() const { return sizes_; }
  int world_size() const { return world_size_; }
  RankCoordinates coordinates(int rank) const;
  /// Ranks of dense coordinates (etp/ep/edp are ignored).
  int rank_of(int tp, int cp, int dp, int pp) const;

  /// Every group of a kind, each a list of global ranks in group order; together they partition the world
  /// (kEmbedding: only first and last stages take part).
  std::vector<std::vector<int>> groups(GroupKind kind) const;
  /// The group of `kind` that holds `rank`; empty when there is none.
  std::vector<int> group_of(GroupKind kind, int rank) const;

 private:
  ParallelSizes sizes_;
  int world_size_;
};

/// A contiguous run of decoder layers.
struct LayerRange {
  int64_t first = 0;
  int64_t count = 0;
};

}  // namespace mcore_bridge
