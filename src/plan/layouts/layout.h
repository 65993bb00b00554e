// The layouts of fused parameters, one function each: which rows of which part follow one another in a rank's
// parameter.
#pragma once

#include "plan/plan.h"

namespace mcore_bridge {

/// One fused part of a rule: whole rows [first_row, first_row + rows) of a tensor of the plan, or absent (tensor < 0).
struct Part {
  int tensor = -1;
  int64_t first_row = 0, rows = 0;
};

/// Appends rows to a rank's parameter, top to bottom.
class RegionBuilder {
 public:
  RegionBuilder(const WeightRule& rule, int rank, int size);

  /// Rows [first, first + count) of a part.
  void add(const Part& part, int64_t first, int64_t count, bool owner = true);
  /// Rows [first, first + count) of the tensor that `parts` take turns in; the parameter holds part after part.
  void add_interleaved(const std::vector<Part>& parts, int64_t first, int64_t count);
  void pad_rows_to(int64_t rows) { local_rows_ = rows; }
  /// What follows comes from this matrix of stacked tensors.
  void select_matrix(int64_t matrix) { matrix_ = matrix; }

  void must_divide(int64_t value, const char* what) const;
  int64_t local_rows() const { return local_rows_; }
  int64_t columns() const { return columns_; }
  const WeightRule& rule() const { return rule_; }
  std::vector<Region> take() { return std::move(regions_); }

 private:
  Region region(int tensor, int64_t hf_row, int64_t rows, bool owner) const;
  const WeightRule& rule_;
  int rank_, size_;
  int64_t columns_ = 1, first_column_ = 0, local_rows_ = 0, matrix_ = 0;
  std::vector<Region> regions_;
};

/// Rank `rank` of `size` that share the rows (0 of 1 when rows are whole).
using Layout = void (*)(RegionBuilder& builder, const std::vector<Part>& parts, int rank, int size);

void stack_layout(RegionBuilder& builder, const std::vector<Part>& parts, int rank, int size);
/// The rows, padded so that the ranks share them evenly.
void padded_layout(RegionBuilder& builder, const std::vector<Part>& parts, int rank, int size);
void qkv_layout(RegionBuilder& builder, const std::vector<Part>& parts, int rank, int size);
void split_qkv_layout(RegionBuilder& builder, const std::vector<Part>& parts, int rank, int size);
void groups_layout(RegionBuilder& builder, const std::vector<Part>& parts, int rank, int size);
void interleaved_layout(RegionBuilder& builder, const std::vector<Part>& parts, int rank, int size);

}  // namespace mcore_bridge
