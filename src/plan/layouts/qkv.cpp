#include "mcore_bridge/error.h"
#include "plan/layouts/layout.h"

namespace mcore_bridge {
namespace {

/// Query rows and key/value groups of one rank.
struct Share {
  int64_t first_query = 0, query_rows = 0;
  int64_t first_group = 0, groups = 0;
  bool owns_groups = true;
};

Share share_of(const RegionBuilder& builder, int rank, int size) {
  const auto& heads = builder.rule().heads;
  const auto& name = builder.rule().name;
  MCB_CHECK(heads.groups > 0 && heads.heads % heads.groups == 0 && heads.heads % size == 0, "plan: ", name, ": ",
            heads.heads, " heads in ", heads.groups, " groups do not divide by tensor_model_parallel_size ", size);
  const auto rows = heads.query_rows() / size;
  if (heads.groups >= size) {
    MCB_CHECK(heads.groups % size == 0, "plan: ", name, ": ", heads.groups,
              " groups do not divide by tensor_model_parallel_size ", size);
    const auto groups = heads.groups / size;
    return {rank * rows, rows, rank * groups, groups, true};
  }
  // Fewer key/value heads than ranks: neighbours hold the same one and share its query heads.
  MCB_CHECK(size % heads.groups == 0, "plan: ", name, ": tensor_model_parallel_size ", size, " is no multiple of the ",
            heads.groups, " groups");
  const auto copies = size / heads.groups;
  return {rank * rows, rows, rank / copies, 1, rank % copies == 0};
}

}  // namespace

void qkv_layout(RegionBuilder& builder, const std::vector<Part>& parts, int rank, int size) {
  const auto share = share_of(builder, rank, size);
  const auto head_dim = builder.rule().heads.head_dim;
  const auto rows = share.query_rows / share.groups;  // query rows of one group
  for (int64_t i = 0; i < share.groups; ++i) {
    builder.add(parts[0], share.first_query + i * rows, rows);
    builder.add(parts[1], (share.first_group + i) * head_dim, head_dim, share.owns_groups);
    builder.add(parts[2], (share.first_group + i) * head_dim, head_dim, share.owns_groups);
  }
}

void split_qkv_layout(RegionBuilder& builder, const std::vector<Part>& parts, int rank, int size) {
  const auto share = share_of(builder, rank, size);
  const auto head_dim = builder.rule().heads.head_dim;
  builder.add(parts[0], share.first_query, share.query_rows);
  for (int part = 1; part < 3; ++part)
    builder.add(parts[part], share.first_group * head_dim, share.groups * head_dim, share.owns_groups);
}

}  // namespace mcore_bridge
