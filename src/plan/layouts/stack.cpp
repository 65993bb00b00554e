#include <algorithm>

#include "plan/layouts/layout.h"

namespace mcore_bridge {

void stack_layout(RegionBuilder& builder, const std::vector<Part>& parts, int rank, int size) {
  for (const auto& part : parts) {
    if (part.tensor < 0) continue;
    if (size > 1) builder.must_divide(part.rows, "rows");
    builder.add(part, rank * part.rows / size, part.rows / size);
  }
}

void padded_layout(RegionBuilder& builder, const std::vector<Part>& parts, int rank, int size) {
  const auto& part = parts[0];
  const auto local = (part.rows + size - 1) / size;
  const auto first = std::min(part.rows, rank * local);
  builder.add(part, first, std::min(local, part.rows - first));
  builder.pad_rows_to(local);
}

}  // namespace mcore_bridge
