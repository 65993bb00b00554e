#include "train/state_plan.h"

#include <ATen/ATen.h>

#include <unordered_map>

#include "mcore_bridge/error.h"
#include "models/gpt_model.h"
#include "plan/clip.h"

namespace mcore_bridge {
namespace {

constexpr int64_t kBlockBytes = 4 << 20;  // what one thread reads or writes at a time

}  // namespace

at::Tensor stored_view(const at::Tensor& flat, int64_t begin, const ParameterPlan& plan, const Region& region) {
  const auto ld = plan.columns(), start = flat.storage_offset() + region.row * ld + region.col - begin;
  const auto turns = region.stretches;
  auto view = turns == 1
                  ? flat.as_strided({region.rows, region.cols}, {ld, 1}, start)
                  : flat.as_strided({region.rows / turns, turns, region.cols}, {ld, region.stretch * ld, 1}, start);
  if (plan.tensors[region.tensor].transposed) view = view.movedim(-1, 0);
  return view;
}

std::vector<Region> stored_blocks(const HfTensor& tensor, const Region& region, int64_t element_bytes, int64_t bytes) {
  const auto box = stored_box(tensor, region);
  const auto unit = tensor.transposed ? 1 : region.stretches;
  const auto height = std::max<int64_t>(1, bytes / std::max<int64_t>(1, box.cols * element_bytes) / unit) * unit;
  std::vector<Region> result;
  for (int64_t row = 0; row < box.rows; row += height)
    result.push_back(stored_rows(tensor, region, row, std::min(height, box.rows - row)));
  return result;
}

std::vector<PlannedSlice> plan_slices(const Chunks& chunks, const std::vector<PlannedParameter>& parameters,
                                      std::vector<StateSlice> slices) {
  std::unordered_map<const at::TensorImpl*, const PlannedParameter*> planned;
  for (const auto& parameter : parameters) planned[parameter.tensor.unsafeGetTensorImpl()] = &parameter;
  std::vector<std::unordered_map<std::string, const at::TensorImpl*>> named(chunks.size());
  for (size_t i = 0; i < chunks.size(); ++i) {
    for (const auto& parameter : chunks[i]->named_parameters())
      named[i][parameter.name] = parameter.tensor.unsafeGetTensorImpl();
  }
  std::vector<PlannedSlice> result;
  std::string lost;
  for (auto& slice : slices) {
    const auto* tensor = named.at(static_cast<size_t>(slice.chunk)).at(slice.parameter);
    const auto found = planned.find(tensor);
    if (found == planned.end()) {
      if (lost.find(slice.parameter) == std::string::npos) lost += "\n  " + slice.parameter;
      continue;
    }
    TORCH_INTERNAL_ASSERT(
        slice.values.dim() == 1 && slice.values.numel() == slice.end - slice.begin && slice.values.is_contiguous(),
        slice.parameter, ": a state slice is no flat view of its range");
    std::vector<Region> regions;
    for (const auto& region : clip(found->second->plan, slice.begin, slice.end)) {
      for (auto& block : stored_blocks(found->second->plan.tensors[region.tensor], region,
                                       static_cast<int64_t>(slice.values.element_size()), kBlockBytes))
        regions.push_back(block);
    }
    result.push_back({std::move(slice), found->second, std::move(regions)});
  }
  MCB_CHECK(lost.empty(),
            "checkpoint: these parameters are trained but are no part of the adapter that is saved:", lost,
            "\nfreeze them, or add them to modules_to_save");
  return result;
}

}  // namespace mcore_bridge
