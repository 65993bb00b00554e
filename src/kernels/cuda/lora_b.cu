// B of a fused layer to and from one matrix: see kernels/lora_b.h.
#include "vector.cuh"

namespace mcore_bridge::cuda {
namespace {

constexpr int kThreads = 256;

/// Where an element of the expanded matrix [row, column] is in the compact one; -1: nowhere.
__device__ __forceinline__ int64_t compact_index(const LoraB& p, int row, int column) {
  const int width = p.first_row[p.parts], block = row / width, within = row - block * width;
  int part = 0;
  while (within >= p.first_row[part + 1]) ++part;
  const int first = p.first_column[part];
  if (p.first_compact_row[part] < 0 || column < first || column >= first + p.r) return -1;
  const int64_t compact_row =
      static_cast<int64_t>(block) * p.compact_rows + p.first_compact_row[part] + within - p.first_row[part];
  return compact_row * p.r + column - first;
}

template <class T>
__global__ void __launch_bounds__(kThreads) expand_kernel(const __grid_constant__ LoraB p) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= p.blocks * p.first_row[p.parts] * p.columns) return;
  const int row = i / p.columns, column = i % p.columns;
  const auto at = compact_index(p, row, column);
  const auto value = static_cast<T>(at < 0 ? 0.f : p.scaling * static_cast<float>(static_cast<const T*>(p.from)[at]));
  static_cast<T*>(p.to)[i] = value;
  if (p.inside) static_cast<T*>(p.inside)[static_cast<int64_t>(row) * p.inside_stride + column] = value;
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads) collect_kernel(const __grid_constant__ LoraB p) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= p.blocks * p.first_row[p.parts] * p.columns) return;
  const auto at = compact_index(p, i / p.columns, i % p.columns);
  if (at < 0) return;
  auto& to = static_cast<To*>(p.to)[at];
  const float value = p.scaling * static_cast<float>(static_cast<const From*>(p.from)[i]);
  to = static_cast<To>(p.accumulate ? static_cast<float>(to) + value : value);
}

unsigned grid(const LoraB& p) {
  return static_cast<unsigned>((static_cast<int64_t>(p.blocks) * p.first_row[p.parts] * p.columns + kThreads - 1) /
                               kThreads);
}

}  // namespace

void expand_b(const LoraB& p, Type type, Stream stream) {
  with_type(type, [&](auto zero) { expand_kernel<decltype(zero)><<<grid(p), kThreads, 0, native(stream)>>>(p); });
  check_launch("expand_b");
}

void collect_b(const LoraB& p, Type from, Type to, Stream stream) {
  with_type(from, [&](auto a) {
    with_type(to,
              [&](auto b) { collect_kernel<decltype(a), decltype(b)><<<grid(p), kThreads, 0, native(stream)>>>(p); });
  });
  check_launch("collect_b");
}

}  // namespace mcore_bridge::cuda
