// Where every byte lives: for each local parameter, the boxes of the Hugging Face tensors it is made of. A pure
// function of rules and ranks; load, save, export, initialisation and adapters are loops over it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/weight_rule.h"

namespace mcore_bridge {

/// A Hugging Face tensor as `rows` x `cols` matrices of (outputs, inputs), however it is stored; a vector has cols
/// == 1.
struct HfTensor {
  std::string name;
  int64_t rows = 0, cols = 1;
  bool vector = false;       ///< stored without a dimension for its one column
  int64_t matrices = 0;      ///< leading dimension of a tensor that stacks experts; 0: there is none
  bool transposed = false;   ///< stored as [cols, rows]
  bool depthwise = false;    ///< stored as [rows, 1, cols]
  bool leading_one = false;  ///< stored with a leading dimension of 1
  bool float32 = false;      ///< stored in float32 whatever the model's precision
  /// The shape in the file.
  std::vector<int64_t> sizes() const;
  int64_t numel() const { return (matrices == 0 ? 1 : matrices) * rows * cols; }
};

/// A box of `rows` x `cols` elements at (hf_row, hf_col) of a matrix of a Hugging Face tensor and at (row, col) of the
/// parameter, seen as a matrix too (leading dimensions and rows flattened).
struct Region {
  int tensor = 0;  ///< index into ParameterPlan::tensors
  int64_t hf_row = 0, hf_col = 0;
  int64_t row = 0, col = 0;
  int64_t rows = 0, cols = 0;
  bool owner = true;   ///< exactly one rank of the model-parallel group owns each element; owners write
  int64_t matrix = 0;  ///< which of HfTensor::matrices
  /// The box's Hugging Face rows take turns among so many stretches of the parameter's rows, which begin `stretch` rows
  /// apart (interleaved gate and up).
  int64_t stretches = 1, stretch = 0;
  /// The parameter's row of the box's i-th Hugging Face row.
  int64_t parameter_row(int64_t i) const {
    return stretches == 1 ? row + i : row + i % stretches * stretch + i / stretches;
  }
};

/// Element (i, j) of a region is `offset + i * row + j * col` elements from the start of the Hugging Face tensor.
struct HfStrides {
  int64_t offset = 0, row = 0, col = 0;
};
HfStrides hf_strides(const HfTensor& tensor, const Region& region);

/// The region's box in the tensor as it is stored, seen as a matrix whose columns are the last dimension (transposed
/// and stacked tensors: not the region's own rows and columns).
struct StoredBox {
  int64_t row = 0, col = 0, rows = 0, cols = 0;
};
StoredBox stored_box(const HfTensor& tensor, const Region& region);
/// Columns of that matrix.
int64_t stored_columns(const HfTensor& tensor);
/// The part of a region whose stored box is rows [first, first + count) of the region's; with stretches and without
/// transposition both must be multiples of `stretches`.
Region stored_rows(const HfTensor& tensor, const Region& region, int64_t first, int64_t count);

struct ParameterPlan {
  std::string name;            ///< as WeightRule::name
  std::vector<int64_t> sizes;  ///< local shape
  std::vector<HfTensor> tensors;
  std::vector<Region> regions;  ///< what no region covers is zero (vocabulary padding)
  WeightRule rule;
  /// Columns of the parameter seen as a matrix.
  int64_t columns() const { return rule.cols == 0 ? 1 : sizes.back(); }
};

/// The rank's places in the groups that matrices are split over.
struct SplitRanks {
  int tp_rank = 0, tp_size = 1;
  int etp_rank = 0, etp_size = 1;  ///< of expert parameters
};

/// Whole rows of each part of a rule, absent ones included. ValueError when they do not add up.
std::vector<int64_t> part_rows(const WeightRule& rule);

/// Throws ValueError when the rule cannot be split over the ranks. `owner` of a replicated parameter is rank 0 of its
/// group.
ParameterPlan plan_parameter(const WeightRule& rule, const SplitRanks& ranks);
ParameterPlan plan_parameter(const WeightRule& rule, int tp_rank, int tp_size);
std::vector<ParameterPlan> make_plan(const std::vector<WeightRule>& rules, const SplitRanks& ranks);
std::vector<ParameterPlan> make_plan(const std::vector<WeightRule>& rules, int tp_rank, int tp_size);

/// Experts [first, first + count) of an expert-parallel rank. ValueError when they do not divide.
struct ExpertRange {
  int64_t first = 0, count = 0;
};
ExpertRange local_experts(int64_t total, int ep_rank, int ep_size);

}  // namespace mcore_bridge
