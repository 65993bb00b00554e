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

namespace {

/// What ranks of one group have in common: two ranks are together when these agree.
std::vector<int> group_key(GroupKind kind, const RankCoordinates& at, int last_stage) {
  switch (kind) {
    case GroupKind::kTensor:
      return {at.cp, at.dp, at.pp};
    case GroupKind::kContext:
      return {at.tp, at.dp, at.pp};
    case GroupKind::kData:
      return {at.tp, at.cp, at.pp};
    case GroupKind::kDataContext:
      return {at.tp, at.pp};
    case GroupKind::kPipeline:
    case GroupKind::kPipelineBack:
      return {at.tp, at.cp, at.dp};
    case GroupKind::kModel:
      return {at.copy};
    case GroupKind::kTensorContext:
      return {at.dp, at.pp};
    case GroupKind::kEmbedding:
      return {at.tp, at.cp, at.dp};
    case GroupKind::kExpert:
      return {at.etp, at.edp, at.pp};
    case GroupKind::kExpertTensor:
      return {at.ep, at.edp, at.pp};
    case GroupKind::kExpertData:
      return {at.etp, at.ep, at.pp};
    case GroupKind::kWorld:
      return {};
  }
  return {last_stage};
}

}  // namespace

std::vector<std::vector<int>> Topology::groups(GroupKind kind) const {
  const int last_stage = sizes_.pipeline - 1;
  std::vector<std::pair<std::vector<int>, std::vector<int>>> found;  // in order of the first member
  for (int rank = 0; rank < world_size_; ++rank) {
    const auto place = coordinates(rank);
    if (kind == GroupKind::kEmbedding && place.pp != 0 && place.pp != last_stage) continue;
    auto key = group_key(kind, place, last_stage);
    auto at = std::find_if(found.begin(), found.end(), [&](const auto& entry) { return entry.first == key; });
    if (at == found.end()) at = found.insert(found.end(), {std::move(key), {}});
    at->second.push_back(rank);
  }
  std::vector<std::vector<int>> result;
  for (auto& entry : found) result.push_back(std::move(entry.second));
  return result;
}

std::vector<int> Topology::group_of(GroupKind kind, int rank) const {
  for (auto& group : groups(kind)) {
    if (std::find(group.begin(), group.end(), rank) != group.end()) return group;
  }
  return {};
}

}  // namespace mcore_bridge
