#include "mcore_bridge/topology.h"

#include <algorithm>
#include <numeric>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

struct Name {
  GroupKind kind;
  const char* name;
};
constexpr Name kNames[] = {
    {GroupKind::kTensor, "tp"},         {GroupKind::kContext, "cp"},          {GroupKind::kData, "dp"},
    {GroupKind::kDataContext, "dp-cp"}, {GroupKind::kPipeline, "pp"},         {GroupKind::kPipelineBack, "pp-back"},
    {GroupKind::kModel, "model"},       {GroupKind::kTensorContext, "tp-cp"}, {GroupKind::kEmbedding, "embd"},
    {GroupKind::kExpert, "ep"},         {GroupKind::kExpertTensor, "etp"},    {GroupKind::kExpertData, "edp"},
    {GroupKind::kWorld, "world"},
};

std::string divisors(int number) {
  std::string text;
  for (int d = 1; d <= number; ++d) {
    if (number % d == 0) text += (text.empty() ? "" : ", ") + std::to_string(d);
  }
  return text;
}

}  // namespace

const char* group_name(GroupKind kind) {
  for (const auto& entry : kNames) {
    if (entry.kind == kind) return entry.name;
  }
  return "";
}

const std::vector<GroupKind>& all_group_kinds() {
  static const std::vector<GroupKind> kinds = [] {
    std::vector<GroupKind> result;
    for (const auto& entry : kNames) result.push_back(entry.kind);
    return result;
  }();
  return kinds;
}

Topology::Topology(ParallelSizes sizes, int world_size) : sizes_(sizes), world_size_(world_size) {
  // Sizes beyond any machine stop growing the product here, so that it cannot overflow.
  auto product = [](std::initializer_list<int64_t> factors) {
    int64_t result = 1;
    for (const auto factor : factors) result = std::min(result * factor, int64_t{1} << 31);
    return result;
  };
  MCB_CHECK(world_size > 0, "world size ", world_size, " must be positive");
  auto positive = [](const char* name, int value) { MCB_CHECK(value > 0, name, ": ", value, " must be at least 1"); };
  positive("tensor_model_parallel_size", sizes.tensor);
  positive("pipeline_model_parallel_size", sizes.pipeline);
  positive("virtual_pipeline_model_parallel_size", sizes.virtual_pipeline);
  positive("context_parallel_size", sizes.context);
  positive("expert_model_parallel_size", sizes.expert);
  positive("expert_tensor_parallel_size", sizes.expert_tensor);
  const int64_t model = product({sizes.tensor, sizes.context, sizes.pipeline});
  MCB_CHECK(world_size % model == 0, "tensor_model_parallel_size ", sizes.tensor, " x context_parallel_size ",
            sizes.context, " x pipeline_model_parallel_size ", sizes.pipeline, " = ", model, " does not divide the ",
            world_size, " processes; the product must be one of ", divisors(world_size));
  const int64_t expert = product({sizes.expert_tensor, sizes.expert, sizes.pipeline});
  MCB_CHECK(world_size % expert == 0, "expert_tensor_parallel_size ", sizes.expert_tensor,
            " x expert_model_parallel_size ", sizes.expert, " x pipeline_model_parallel_size ", sizes.pipeline, " = ",
            expert, " does not divide the ", world_size, " processes; the product must be one of ",
            divisors(world_size));
  sizes_.data = static_cast<int>(world_size / model);
}

RankCoordinates Topology::coordinates(int rank) const {
  MCB_CHECK(rank >= 0 && rank < world_size_, "rank ", rank, " is not below the world size ", world_size_);
  const auto& s = sizes_;
  RankCoordinates place;
  place.tp = rank % s.tensor;
  place.cp = rank / s.tensor % s.context;
  place.dp = rank / (s.tensor * s.context) % s.data;
  place.pp = rank / (s.tensor * s.context * s.data);
  const int inner = rank % (s.tensor * s.context * s.data);
  place.etp = inner % s.expert_tensor;
  place.ep = inner / s.expert_tensor % s.expert;
  place.edp = inner / (s.expert_tensor * s.expert);
  place.copy = inner / std::lcm(s.tensor, s.expert_tensor * s.expert);
  return place;
}

int Topology::rank_of(int tp, int cp, int dp, int pp) const {
  return tp + sizes_.tensor * (cp + sizes_.context * (dp + sizes_.data * pp));
}

std::vector<std::vector<int>> Topology::groups(GroupKind kind) const {
  std::vector<std::vector<int>> result;
  std::vector<bool> placed(static_cast<size_t>(world_size_), false);
  for (int rank = 0; rank < world_size_; ++rank) {
    if (placed[rank]) continue;
    auto group = group_of(kind, rank);
    for (const int member : group) placed[member] = true;
    if (!group.empty()) result.push_back(std::move(group));
  }
  return result;
}

std::vector<int> Topology::group_of(GroupKind kind, int rank) const {
  const auto& s = sizes_;
  const auto at = coordinates(rank);
  const int stage_ranks = s.tensor * s.context * s.data;
  std::vector<int> result;
  // Members differ in the coordinates that vary, in the order of ranks.
  auto dense = [&](bool tp, bool cp, bool dp, bool pp) {
    for (int p = pp ? 0 : at.pp; p <= (pp ? s.pipeline - 1 : at.pp); ++p) {
      for (int d = dp ? 0 : at.dp; d <= (dp ? s.data - 1 : at.dp); ++d) {
        for (int c = cp ? 0 : at.cp; c <= (cp ? s.context - 1 : at.cp); ++c) {
          for (int t = tp ? 0 : at.tp; t <= (tp ? s.tensor - 1 : at.tp); ++t) result.push_back(rank_of(t, c, d, p));
        }
      }
    }
  };
  auto expert = [&](bool etp, bool ep, bool edp) {
    const int replicas = stage_ranks / (s.expert_tensor * s.expert);
    for (int d = edp ? 0 : at.edp; d <= (edp ? replicas - 1 : at.edp); ++d) {
      for (int e = ep ? 0 : at.ep; e <= (ep ? s.expert - 1 : at.ep); ++e) {
        for (int t = etp ? 0 : at.etp; t <= (etp ? s.expert_tensor - 1 : at.etp); ++t)
          result.push_back(at.pp * stage_ranks + t + s.expert_tensor * (e + s.expert * d));
      }
    }
  };
  switch (kind) {
    case GroupKind::kTensor:
      dense(true, false, false, false);
      break;
    case GroupKind::kContext:
      dense(false, true, false, false);
      break;
    case GroupKind::kData:
      dense(false, false, true, false);
      break;
    case GroupKind::kDataContext:
      dense(false, true, true, false);
      break;
    case GroupKind::kPipeline:
    case GroupKind::kPipelineBack:
      dense(false, false, false, true);
      break;
    case GroupKind::kModel: {
      const int width = std::lcm(s.tensor, s.expert_tensor * s.expert);  // of a copy on one stage
      for (int p = 0; p < s.pipeline; ++p) {
        for (int i = 0; i < width; ++i) result.push_back(p * stage_ranks + at.copy * width + i);
      }
      break;
    }
    case GroupKind::kTensorContext:
      dense(true, true, false, false);
      break;
    case GroupKind::kEmbedding:
      if (at.pp != 0 && at.pp != s.pipeline - 1) break;
      result.push_back(rank_of(at.tp, at.cp, at.dp, 0));
      if (s.pipeline > 1) result.push_back(rank_of(at.tp, at.cp, at.dp, s.pipeline - 1));
      break;
    case GroupKind::kExpert:
      expert(false, true, false);
      break;
    case GroupKind::kExpertTensor:
      expert(true, false, false);
      break;
    case GroupKind::kExpertData:
      expert(false, false, true);
      break;
    case GroupKind::kWorld:
      dense(true, true, true, true);
      break;
  }
  return result;
}

}  // namespace mcore_bridge
