// Slices of the optimizer's state in the terms of the plan: which boxes of which Hugging Face tensors they are.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "bridge/checkpoint_plan.h"
#include "parallel/parallel_state.h"
#include "train/optimizer_state.h"

namespace mcore_bridge {

/// The kinds of state there are; a file set each.
inline constexpr std::array<const char*, 5> kStateKinds = {"master", "remainder", "exp_avg", "exp_avg_sq",
                                                           "momentum_buffer"};

/// The elements of a region, in the order of its stored box. `flat`: elements of the flattened parameter from element
/// `begin` on. A view: two-dimensional, but for interleaved regions.
at::Tensor stored_view(const at::Tensor& flat, int64_t begin, const ParameterPlan& plan, const Region& region);

/// A region cut, along the rows of its stored box, into parts of at most about `bytes`.
std::vector<Region> stored_blocks(const HfTensor& tensor, const Region& region, int64_t element_bytes, int64_t bytes);

/// A slice and the boxes it is made of.
struct PlannedSlice {
  StateSlice slice;
  const PlannedParameter* parameter = nullptr;
  std::vector<Region> regions;

  const HfTensor& tensor(const Region& region) const { return parameter->plan.tensors[region.tensor]; }
};

/// Binds `slices` to the parameters of a checkpoint. ValueError names trained parameters that are no part of it.
std::vector<PlannedSlice> plan_slices(const Chunks& chunks, const std::vector<PlannedParameter>& parameters,
                                      std::vector<StateSlice> slices);

}  // namespace mcore_bridge
