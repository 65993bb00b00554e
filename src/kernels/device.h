// What the operations of this folder need to reach their CUDA kernels. Each has a reference in plain ATen, which runs
// on the CPU, in float64, and wherever a kernel does not take the shape.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <optional>

#include "kernels/cuda/launch.h"

namespace mcore_bridge {

/// The kernels' type when they can run on x: on a GPU, of a type they have, its rows 16-byte aligned.
inline std::optional<cuda::Type> kernel_type(const at::Tensor& x) {
  if (!x.is_cuda() || !cuda::built()) return std::nullopt;
  switch (x.scalar_type()) {
    case at::kFloat:
      return cuda::Type::kFloat;
    case at::kBFloat16:
      return cuda::Type::kBFloat16;
    case at::kHalf:
      return cuda::Type::kHalf;
    default:
      return std::nullopt;
  }
}

/// 16-byte accesses stay aligned in every row of `columns` elements.
inline bool vector_rows(int64_t columns, cuda::Type type) { return columns % cuda::vector_elements(type) == 0; }

inline bool aligned(const at::Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

inline cuda::Stream current_stream(const at::Tensor& x) {
  return c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).native_handle();
}

/// x itself, or a copy that kernels can read: contiguous and aligned.
inline at::Tensor readable(const at::Tensor& x) {
  if (!x.defined()) return x;
  auto y = x.contiguous();
  return aligned(y) ? y : y.clone();
}

inline const void* pointer(const at::Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }
inline void* mutable_pointer(const at::Tensor& x) { return x.defined() ? x.mutable_data_ptr() : nullptr; }

}  // namespace mcore_bridge
