#include "plan/layouts/layout.h"

#include <algorithm>

#include "mcore_bridge/error.h"

namespace mcore_bridge {

RegionBuilder::RegionBuilder(const WeightRule& rule, int rank, int size) : rule_(rule), rank_(rank), size_(size) {
  columns_ = std::max<int64_t>(1, rule.cols);
  if (rule.shard != Shard::kRow) return;
  must_divide(columns_, "columns");
  columns_ /= size;
  first_column_ = rank * columns_;
}

void RegionBuilder::must_divide(int64_t value, const char* what) const {
  MCB_CHECK(value % size_ == 0, "plan: ", rule_.name, ": its ", value, " ", what, " do not divide by ",
            rule_.experts.total > 0 ? "expert_" : "", "tensor_", rule_.experts.total > 0 ? "" : "model_",
            "parallel_size ", size_);
}

Region RegionBuilder::region(int tensor, int64_t hf_row, int64_t rows, bool owner) const {
  if (rule_.shard == Shard::kReplicated) owner = owner && rank_ == 0;
  return {.tensor = tensor,
          .hf_row = hf_row,
          .hf_col = first_column_,
          .row = local_rows_,
          .col = 0,
          .rows = rows,
          .cols = columns_,
          .owner = owner && !rule_.copy,
          .matrix = matrix_};
}

void RegionBuilder::add(const Part& part, int64_t first, int64_t count, bool owner) {
  if (part.tensor < 0 || count == 0) return;
  regions_.push_back(region(part.tensor, part.first_row + first, count, owner));
  local_rows_ += count;
}

void RegionBuilder::add_interleaved(const std::vector<Part>& parts, int64_t first, int64_t count) {
  if (count == 0) return;
  auto added = region(parts[0].tensor, first, count, true);
  added.stretches = static_cast<int64_t>(parts.size());
  added.stretch = count / added.stretches;
  regions_.push_back(added);
  local_rows_ += count;
}

}  // namespace mcore_bridge
