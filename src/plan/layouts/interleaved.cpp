#include "mcore_bridge/error.h"
#include "plan/layouts/layout.h"

namespace mcore_bridge {

void interleaved_layout(RegionBuilder& builder, const std::vector<Part>& parts, int rank, int size) {
  const auto& name = builder.rule().name;
  int64_t rows = 0;
  for (const auto& part : parts) {
    MCB_CHECK(part.tensor >= 0 && part.tensor == parts[0].tensor && part.rows == parts[0].rows, "plan: ", name,
              ": interleaved parts are equal rows of one tensor");
    rows += part.rows;
  }
  builder.must_divide(parts[0].rows, "rows of each interleaved part");
  builder.add_interleaved(parts, rank * (rows / size), rows / size);
}

}  // namespace mcore_bridge
