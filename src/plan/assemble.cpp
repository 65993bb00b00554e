#include "plan/assemble.h"

#include <cstring>

namespace mcore_bridge {
namespace {

/// Calls copy(place in the tensor, place in the parameter, count) for runs of elements that lie together on both sides.
template <class Copy>
void for_each_run(const ParameterPlan& plan, const Region& region, Copy&& copy) {
  const auto& tensor = plan.tensors[region.tensor];
  const auto strides = hf_strides(tensor, region);
  const auto columns = plan.columns();
  for (int64_t i = 0; i < region.rows; ++i) {
    const auto here = region.parameter_row(i) * columns + region.col, there = strides.offset + i * strides.row;
    if (strides.col == 1) {
      copy(there, here, region.cols);
    } else {
      for (int64_t j = 0; j < region.cols; ++j) copy(there + j * strides.col, here + j, int64_t{1});
    }
  }
}

}  // namespace

void assemble(const ParameterPlan& plan, size_t element_bytes, const std::vector<const std::byte*>& tensors,
              std::byte* parameter) {
  size_t elements = 1;
  for (const auto size : plan.sizes) elements *= static_cast<size_t>(size);
  std::memset(parameter, 0, elements * element_bytes);
  for (const auto& region : plan.regions) {
    for_each_run(plan, region, [&](int64_t there, int64_t here, int64_t count) {
      std::memcpy(parameter + here * element_bytes, tensors[region.tensor] + there * element_bytes,
                  count * element_bytes);
    });
  }
}

void disassemble(const ParameterPlan& plan, size_t element_bytes, const std::byte* parameter,
                 const std::vector<std::byte*>& tensors) {
  for (const auto& region : plan.regions) {
    if (!region.owner) continue;
    for_each_run(plan, region, [&](int64_t there, int64_t here, int64_t count) {
      std::memcpy(tensors[region.tensor] + there * element_bytes, parameter + here * element_bytes,
                  count * element_bytes);
    });
  }
}

}  // namespace mcore_bridge
