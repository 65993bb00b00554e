#include "plan/plan.h"

#include <algorithm>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

/// One fused part: where it is in ParameterPlan::tensors (or absent) and how many whole rows it has.
struct Part {
  int tensor = -1;
  int64_t rows = 0;
};

/// Rows of each part, absent ones included (their rows count for nothing).
std::vector<int64_t> part_rows(const WeightRule& rule, int64_t present) {
  if (rule.fuse == Fuse::kQkv) {
    const auto& heads = rule.heads;
    return {heads.heads * heads.head_dim, heads.groups * heads.head_dim, heads.groups * heads.head_dim};
  }
  MCB_CHECK(rule.rows % present == 0, "plan: ", rule.name, ": ", rule.rows, " rows do not divide into ", present,
            " parts");
  return std::vector<int64_t>(rule.hf.size(), rule.rows / present);
}

class Planner {
 public:
  Planner(const WeightRule& rule, int rank, int size) : rule_(rule), rank_(rank), size_(size) {
    plan_.name = rule.name;
    plan_.rule = rule;
    whole_columns_ = std::max<int64_t>(1, rule.cols);
    columns_ = whole_columns_;
    if (rule.shard == Shard::kRow) {
      must_divide(whole_columns_, "columns");
      columns_ /= size;
      first_column_ = rank * columns_;
    }
    const auto present = std::count_if(rule.hf.begin(), rule.hf.end(), [](const auto& name) { return !name.empty(); });
    MCB_CHECK(present > 0, "plan: ", rule.name, " is made of no tensor");
    const auto rows = part_rows(rule, present);
    MCB_CHECK(rows.size() == rule.hf.size(), "plan: ", rule.name, " has ", rule.hf.size(), " parts, its fusion ",
              rows.size());
    for (size_t i = 0; i < rule.hf.size(); ++i) {
      Part part;
      if (!rule.hf[i].empty()) {
        part = {static_cast<int>(plan_.tensors.size()), rows[i]};
        plan_.tensors.push_back(
            {.name = rule.hf[i], .rows = rows[i], .cols = whole_columns_, .vector = rule.cols == 0});
      }
      parts_.push_back(part);
    }
  }

  ParameterPlan run() {
    if (rule_.shard != Shard::kColumn) {
      // Rows are whole: the parts one after the other, except that QKV interleaves them per group.
      rule_.fuse == Fuse::kQkv ? qkv(0, 1) : stack(0, 1);
    } else if (rule_.fuse == Fuse::kQkv) {
      qkv(rank_, size_);
    } else if (rule_.pad_rows) {
      padded();
    } else {
      stack(rank_, size_);
    }
    plan_.sizes = rule_.cols == 0 ? std::vector<int64_t>{local_rows_} : std::vector<int64_t>{local_rows_, columns_};
    return std::move(plan_);
  }

 private:
  void must_divide(int64_t value, const char* what) const {
    MCB_CHECK(value % size_ == 0, "plan: ", rule_.name, ": its ", value, " ", what,
              " do not divide by tensor_model_parallel_size ", size_);
  }

  /// Appends rows [first, first + count) of a part to the local parameter.
  void add(const Part& part, int64_t first, int64_t count, bool owner) {
    if (part.tensor < 0 || count == 0) return;
    if (rule_.shard == Shard::kReplicated) owner = owner && rank_ == 0;
    plan_.regions.push_back({.tensor = part.tensor,
                             .hf_row = first,
                             .hf_col = first_column_,
                             .row = local_rows_,
                             .col = 0,
                             .rows = count,
                             .cols = columns_,
                             .owner = owner && !rule_.copy});
    local_rows_ += count;
  }

  void stack(int rank, int size) {
    for (const auto& part : parts_) {
      if (part.tensor < 0) continue;
      if (size > 1) must_divide(part.rows, "rows");
      add(part, rank * part.rows / size, part.rows / size, true);
    }
  }

  void padded() {
    const auto& part = parts_[0];
    const auto local = (part.rows + size_ - 1) / size_;
    const auto first = std::min(part.rows, rank_ * local);
    add(part, first, std::min(local, part.rows - first), true);
    local_rows_ = local;
  }

  void qkv(int rank, int size) {
    const auto& heads = rule_.heads;
    MCB_CHECK(heads.heads % size == 0 && heads.heads % heads.groups == 0, "plan: ", rule_.name, ": ", heads.heads,
              " heads in ", heads.groups, " groups do not divide by tensor_model_parallel_size ", size);
    const auto group_rows = heads.heads / heads.groups * heads.head_dim;  // query rows of one group
    if (heads.groups >= size) {
      MCB_CHECK(heads.groups % size == 0, "plan: ", rule_.name, ": ", heads.groups,
                " groups do not divide by tensor_model_parallel_size ", size);
      const auto local = heads.groups / size;
      for (auto group = rank * local; group < (rank + 1) * local; ++group) {
        add(parts_[0], group * group_rows, group_rows, true);
        add(parts_[1], group * heads.head_dim, heads.head_dim, true);
        add(parts_[2], group * heads.head_dim, heads.head_dim, true);
      }
      return;
    }
    // Fewer key/value heads than ranks: `copies` neighbours hold the same one and share its query heads.
    MCB_CHECK(size % heads.groups == 0, "plan: ", rule_.name, ": tensor_model_parallel_size ", size,
              " is no multiple of the ", heads.groups, " groups");
    const auto copies = size / heads.groups, group = rank / copies, copy = rank % copies;
    add(parts_[0], group * group_rows + copy * (group_rows / copies), group_rows / copies, true);
    add(parts_[1], group * heads.head_dim, heads.head_dim, copy == 0);
    add(parts_[2], group * heads.head_dim, heads.head_dim, copy == 0);
  }

  const WeightRule& rule_;
  int rank_, size_;
  int64_t whole_columns_ = 1, columns_ = 1, first_column_ = 0, local_rows_ = 0;
  std::vector<Part> parts_;
  ParameterPlan plan_;
};

}  // namespace

ParameterPlan plan_parameter(const WeightRule& rule, int tp_rank, int tp_size) {
  return Planner(rule, tp_rank, tp_size).run();
}

std::vector<ParameterPlan> make_plan(const std::vector<WeightRule>& rules, int tp_rank, int tp_size) {
  std::vector<ParameterPlan> result;
  for (const auto& rule : rules) result.push_back(plan_parameter(rule, tp_rank, tp_size));
  return result;
}

}  // namespace mcore_bridge
