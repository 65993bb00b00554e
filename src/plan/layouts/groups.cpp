#include "mcore_bridge/error.h"
#include "plan/layouts/layout.h"

namespace mcore_bridge {

void groups_layout(RegionBuilder& builder, const std::vector<Part>& parts, int rank, int size) {
  const auto groups = builder.rule().grouping.groups;
  const auto& name = builder.rule().name;
  MCB_CHECK(groups > 0, "plan: ", name, " names no groups");
  MCB_CHECK(groups % size == 0, "plan: ", name, ": its ", groups,
            " groups of rows (key heads) do not divide by tensor_model_parallel_size ", size);
  for (const auto& part : parts)
    MCB_CHECK(part.tensor < 0 || part.rows % groups == 0, "plan: ", name, ": a part of ", part.rows,
              " rows does not divide into its ", groups, " groups");
  const auto local = groups / size;
  for (auto group = rank * local; group < (rank + 1) * local; ++group) {
    for (const auto& part : parts) builder.add(part, group * (part.rows / groups), part.rows / groups);
  }
}

}  // namespace mcore_bridge
