// Where every byte lives: for each local parameter, the boxes of the Hugging Face tensors it is made of. A pure
// function of rules and ranks; load, save, export, initialisation and adapters are loops over it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/weight_rule.h"

namespace mcore_bridge {

/// A Hugging Face tensor as a matrix: `rows` x `cols`, where a vector has cols == 1 (and `vector` set).
struct HfTensor {
  std::string name;
  int64_t rows = 0, cols = 1;
  bool vector = false;
  std::vector<int64_t> sizes() const { return vector ? std::vector<int64_t>{rows} : std::vector<int64_t>{rows, cols}; }
};

/// A box of `rows` x `cols` elements at (hf_row, hf_col) of a Hugging Face tensor and at (row, col) of the parameter.
struct Region {
  int tensor = 0;  ///< index into ParameterPlan::tensors
  int64_t hf_row = 0, hf_col = 0;
  int64_t row = 0, col = 0;
  int64_t rows = 0, cols = 0;
  bool owner = true;  ///< exactly one rank of the model-parallel group owns each element; owners write
};

struct ParameterPlan {
  std::string name;            ///< as WeightRule::name
  std::vector<int64_t> sizes;  ///< local shape
  std::vector<HfTensor> tensors;
  std::vector<Region> regions;  ///< what no region covers is zero (vocabulary padding)
  WeightRule rule;
};

/// Throws ValueError when the rule cannot be split over `tp_size` ranks. `owner` of a replicated parameter is tp_rank
/// 0.
ParameterPlan plan_parameter(const WeightRule& rule, int tp_rank, int tp_size);
std::vector<ParameterPlan> make_plan(const std::vector<WeightRule>& rules, int tp_rank, int tp_size);

}  // namespace mcore_bridge
