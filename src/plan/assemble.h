// The plan applied to bytes in memory: Hugging Face tensors to a rank's parameter and back.
#pragma once

#include <cstddef>
#include <vector>

#include "plan/plan.h"

namespace mcore_bridge {

/// Fills `parameter` (the local shape, row after row) from whole tensors in file order of their bytes, one pointer per
/// ParameterPlan::tensors; what no region covers becomes zero.
void assemble(const ParameterPlan& plan, size_t element_bytes, const std::vector<const std::byte*>& tensors,
              std::byte* parameter);
/// The inverse: writes what this rank owns to its places in the whole tensors.
void disassemble(const ParameterPlan& plan, size_t element_bytes, const std::byte* parameter,
                 const std::vector<std::byte*>& tensors);

}  // namespace mcore_bridge
