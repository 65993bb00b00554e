#include "kernels/lora_b.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "kernels/device.h"

namespace mcore_bridge {

int64_t PartLayout::rows() const {
  int64_t sum = 0;
  for (auto width : widths) sum += width;
  return sum * blocks;
}

int64_t adapted_rows(const std::vector<bool>& parts, const PartLayout& layout) {
  int64_t rows = 0;
  for (size_t part = 0; part < parts.size(); ++part) rows += parts[part] ? layout.widths[part] : 0;
  return rows * layout.blocks;
}

namespace {

int64_t count(const std::vector<bool>& parts) {
  int64_t adapted = 0;
  for (const bool part : parts) adapted += part;
  return adapted;
}

/// Calls f(rows of the part in B [blocks, width, r], the same rows and the part's columns of the expanded matrix).
template <class F>
void for_adapted_parts(const at::Tensor& b, const at::Tensor& expanded, const std::vector<bool>& parts,
                       const PartLayout& layout, F f) {
  const auto r = b.size(1);
  const auto compact = b.view({layout.blocks, -1, r}), full = expanded.view({layout.blocks, -1, expanded.size(1)});
  int64_t row = 0, compact_row = 0, column = 0;
  for (size_t part = 0; part < parts.size(); ++part) {
    const auto width = layout.widths[part];
    if (parts[part]) {
      f(compact.narrow(1, compact_row, width), full.narrow(1, row, width).narrow(2, column, r));
      compact_row += width;
      column += r;
    }
    row += width;
  }
}

bool kernel_takes(const at::Tensor& b, const at::Tensor& expanded, const std::vector<bool>& parts) {
  return kernel_type(b) && kernel_type(expanded) && parts.size() <= cuda::LoraB::kMaxParts && b.is_contiguous() &&
         expanded.is_contiguous();
}

cuda::LoraB arguments(const std::vector<bool>& parts, const PartLayout& layout, int64_t r, double scaling) {
  cuda::LoraB p{.parts = static_cast<int>(parts.size()),
                .blocks = static_cast<int>(layout.blocks),
                .r = static_cast<int>(r),
                .columns = static_cast<int>(count(parts) * r),
                .scaling = static_cast<float>(scaling)};
  int row = 0, compact = 0, column = 0;
  for (size_t part = 0; part < parts.size(); ++part) {
    p.first_row[part] = row;
    p.first_compact_row[part] = parts[part] ? compact : -1;
    p.first_column[part] = column;
    row += static_cast<int>(layout.widths[part]);
    if (!parts[part]) continue;
    compact += static_cast<int>(layout.widths[part]);
    column += static_cast<int>(r);
  }
  p.first_row[parts.size()] = row;
  p.compact_rows = compact;
  return p;
}

}  // namespace

at::Tensor expand_b(const at::Tensor& b, const std::vector<bool>& parts, const PartLayout& layout, double scaling,
                    const at::Tensor& inside) {
  if (parts.size() == 1 && !inside.defined()) return b * scaling;
  auto expanded = at::empty({layout.rows(), count(parts) * b.size(1)}, b.options());
  if (kernel_takes(b, expanded, parts)) {
    const c10::DeviceGuard guard(b.device());
    auto p = arguments(parts, layout, b.size(1), scaling);
    p.from = pointer(b);
    p.to = mutable_pointer(expanded);
    if (inside.defined()) {
      p.inside = mutable_pointer(inside);
      p.inside_stride = static_cast<int>(inside.stride(0));
    }
    cuda::expand_b(p, *kernel_type(b), current_stream(b));
    return expanded;
  }
  expanded.zero_();
  for_adapted_parts(b, expanded, parts, layout,
                    [&](const at::Tensor& from, at::Tensor to) { to.copy_(from).mul_(scaling); });
  if (inside.defined()) inside.copy_(expanded);
  return expanded;
}

void collect_b(const at::Tensor& expanded, at::Tensor to, const std::vector<bool>& parts, const PartLayout& layout,
               double scaling, bool accumulate) {
  if (kernel_takes(to, expanded, parts)) {
    const c10::DeviceGuard guard(to.device());
    auto p = arguments(parts, layout, to.size(1), scaling);
    p.from = pointer(expanded);
    p.to = mutable_pointer(to);
    p.accumulate = accumulate;
    cuda::collect_b(p, *kernel_type(expanded), *kernel_type(to), current_stream(to));
    return;
  }
  for_adapted_parts(to, expanded, parts, layout, [&](at::Tensor rows, const at::Tensor& from) {
    const auto scaled = from.to(rows.scalar_type()) * scaling;
    accumulate ? rows.add_(scaled) : rows.copy_(scaled);
  });
}

}  // namespace mcore_bridge
