#include "plan/plan.h"

#include <algorithm>

#include "mcore_bridge/error.h"
#include "plan/layouts/layout.h"

namespace mcore_bridge {
namespace {

Layout layout_of(const WeightRule& rule) {
  switch (rule.fuse) {
    case Fuse::kQkv:
      return qkv_layout;
    case Fuse::kSplitQkv:
      return split_qkv_layout;
    case Fuse::kGroups:
      return groups_layout;
    case Fuse::kInterleaved:
      return interleaved_layout;
    default:
      return rule.pad_rows ? padded_layout : stack_layout;
  }
}

std::string expert_name(std::string name, int64_t expert) {
  const auto at = name.find("{e}");
  if (at != std::string::npos) name.replace(at, 3, std::to_string(expert));
  return name;
}

/// Adds the tensors of one expert (or of a rule without experts) to the plan and says where each part is in them.
std::vector<Part> add_tensors(ParameterPlan& plan, int64_t expert) {
  const auto& rule = plan.rule;
  const auto rows = part_rows(rule);
  std::vector<Part> parts;
  for (size_t i = 0; i < rule.hf.size(); ++i) {
    if (rule.hf[i].empty()) {
      parts.push_back({});
      continue;
    }
    const bool goes_on = i > 0 && rule.hf[i] == rule.hf[i - 1];
    if (!goes_on) {
      plan.tensors.push_back({.name = rule.experts.stacked ? rule.hf[i] : expert_name(rule.hf[i], expert),
                              .rows = 0,
                              .cols = std::max<int64_t>(1, rule.cols),
                              .vector = rule.cols == 0,
                              .matrices = rule.experts.stacked ? rule.experts.total : 0,
                              .transposed = rule.transposed && rule.cols > 0,
                              .depthwise = rule.depthwise,
                              .leading_one = rule.leading_one,
                              .float32 = rule.float32});
    }
    auto& tensor = plan.tensors.back();
    parts.push_back({static_cast<int>(plan.tensors.size()) - 1, tensor.rows, rows[i]});
    tensor.rows += rows[i];
  }
  return parts;
}

void check_experts(const WeightRule& rule) {
  const auto& experts = rule.experts;
  MCB_CHECK(experts.first >= 0 && experts.count > 0 && experts.first + experts.count <= experts.total,
            "plan: ", rule.name, ": experts ", experts.first, " to ", experts.first + experts.count, " of ",
            experts.total);
  MCB_CHECK(experts.grouped || experts.count == 1, "plan: ", rule.name, " is one matrix and cannot hold ",
            experts.count, " experts");
  for (const auto& name : rule.hf)
    MCB_CHECK(experts.stacked || name.empty() || name.find("{e}") != std::string::npos, "plan: ", rule.name, ": '",
              name, "' does not say where the expert's number goes ({e})");
}

}  // namespace

std::vector<int64_t> HfTensor::sizes() const {
  std::vector<int64_t> result;
  if (matrices > 0) result.push_back(matrices);
  if (leading_one) result.push_back(1);
  result.push_back(transposed ? cols : rows);
  if (depthwise) result.push_back(1);
  if (!vector) result.push_back(transposed ? rows : cols);
  return result;
}

HfStrides hf_strides(const HfTensor& tensor, const Region& region) {
  const auto matrix = region.matrix * tensor.rows * tensor.cols;
  if (tensor.transposed) return {matrix + region.hf_col * tensor.rows + region.hf_row, 1, tensor.rows};
  return {matrix + region.hf_row * tensor.cols + region.hf_col, tensor.cols, 1};
}

StoredBox stored_box(const HfTensor& tensor, const Region& region) {
  if (tensor.transposed) return {region.matrix * tensor.cols + region.hf_col, region.hf_row, region.cols, region.rows};
  return {region.matrix * tensor.rows + region.hf_row, region.hf_col, region.rows, region.cols};
}

int64_t stored_columns(const HfTensor& tensor) { return tensor.transposed ? tensor.rows : tensor.cols; }

Region stored_rows(const HfTensor& tensor, const Region& region, int64_t first, int64_t count) {
  auto part = region;
  if (tensor.transposed) {
    part.hf_col += first;
    part.col += first;
    part.cols = count;
    return part;
  }
  MCB_CHECK(first % region.stretches == 0 && count % region.stretches == 0, "plan: rows ", first, " to ", first + count,
            " cut an interleaved region of ", tensor.name);
  part.hf_row += first;
  part.row += first / region.stretches;
  part.rows = count;
  return part;
}

std::vector<int64_t> part_rows(const WeightRule& rule) {
  const auto present = std::count_if(rule.hf.begin(), rule.hf.end(), [](const auto& name) { return !name.empty(); });
  MCB_CHECK(present > 0, "plan: ", rule.name, " is made of no tensor");
  std::vector<int64_t> rows;
  if (rule.fuse == Fuse::kQkv || rule.fuse == Fuse::kSplitQkv) {
    rows = {rule.heads.query_rows(), rule.heads.key_rows(), rule.heads.key_rows()};
  } else if (rule.fuse == Fuse::kGroups) {
    rows = rule.grouping.part_rows;
  } else {
    MCB_CHECK(rule.rows % present == 0, "plan: ", rule.name, ": ", rule.rows, " rows do not divide into ", present,
              " parts");
    rows.assign(rule.hf.size(), rule.rows / present);
  }
  MCB_CHECK(rows.size() == rule.hf.size(), "plan: ", rule.name, " has ", rule.hf.size(), " parts, its fusion ",
            rows.size());
  int64_t sum = 0;
  for (size_t i = 0; i < rows.size(); ++i) sum += rule.hf[i].empty() ? 0 : rows[i];
  MCB_CHECK(sum == rule.rows, "plan: ", rule.name, " has ", rule.rows, " rows, its parts ", sum);
  return rows;
}

ParameterPlan plan_parameter(const WeightRule& rule, const SplitRanks& ranks) {
  const bool experts = rule.experts.total > 0;
  const int rank = experts ? ranks.etp_rank : ranks.tp_rank, size = experts ? ranks.etp_size : ranks.tp_size;
  ParameterPlan plan;
  plan.name = rule.name;
  plan.rule = rule;
  RegionBuilder builder(rule, rank, size);
  // Rows that are not split follow the same layout, as one rank of one.
  const int row_rank = rule.shard == Shard::kColumn ? rank : 0, row_size = rule.shard == Shard::kColumn ? size : 1;
  const auto layout = layout_of(rule);
  if (experts) {
    check_experts(rule);
    std::vector<Part> parts;
    for (int64_t i = 0; i < rule.experts.count; ++i) {
      if (i == 0 || !rule.experts.stacked) parts = add_tensors(plan, rule.experts.first + i);
      if (rule.experts.stacked) builder.select_matrix(rule.experts.first + i);
      layout(builder, parts, row_rank, row_size);
    }
  } else {
    layout(builder, add_tensors(plan, 0), row_rank, row_size);
  }
  plan.regions = builder.take();
  if (rule.experts.grouped) plan.sizes.push_back(rule.experts.count);
  plan.sizes.push_back(builder.local_rows() / (rule.experts.grouped ? rule.experts.count : 1));
  if (rule.depthwise) plan.sizes.push_back(1);
  if (rule.cols > 0) plan.sizes.push_back(builder.columns());
  return plan;
}

ParameterPlan plan_parameter(const WeightRule& rule, int tp_rank, int tp_size) {
  return plan_parameter(rule, SplitRanks{.tp_rank = tp_rank, .tp_size = tp_size});
}

std::vector<ParameterPlan> make_plan(const std::vector<WeightRule>& rules, const SplitRanks& ranks) {
  std::vector<ParameterPlan> result;
  for (const auto& rule : rules) result.push_back(plan_parameter(rule, ranks));
  return result;
}

std::vector<ParameterPlan> make_plan(const std::vector<WeightRule>& rules, int tp_rank, int tp_size) {
  return make_plan(rules, SplitRanks{.tp_rank = tp_rank, .tp_size = tp_size});
}

ExpertRange local_experts(int64_t total, int ep_rank, int ep_size) {
  MCB_CHECK(total > 0 && ep_size > 0 && total % ep_size == 0, "expert_model_parallel_size ", ep_size,
            " does not divide the ", total, " experts");
  return {ep_rank * (total / ep_size), total / ep_size};
}

}  // namespace mcore_bridge
