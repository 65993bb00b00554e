#include "parallel/zigzag.h"

#include <ATen/ATen.h>

#include "mcore_bridge/error.h"

namespace mcore_bridge {

void check_zigzag(const std::vector<int64_t>& ends, int cp, const std::string& what) {
  for (size_t i = 0; i + 1 < ends.size(); ++i) {
    const auto length = ends[i + 1] - ends[i];
    MCB_CHECK(length % (2 * cp) == 0, what, ": ", ends.size() > 2 ? "document " + std::to_string(i) + " has " : "",
              length, " positions, which context_parallel_size ", cp, " cannot cut into ", 2 * cp,
              " equal chunks; pad it to a multiple of ", 2 * cp);
  }
}

std::vector<Span> zigzag_spans(const std::vector<int64_t>& ends, int cp, int rank) {
  std::vector<Span> result;
  for (size_t i = 0; i + 1 < ends.size(); ++i) {
    const auto chunk = (ends[i + 1] - ends[i]) / (2 * cp);
    result.push_back({ends[i] + rank * chunk, chunk});
    result.push_back({ends[i] + (2 * cp - 1 - rank) * chunk, chunk});
  }
  return result;
}

at::Tensor zigzag_slice(const at::Tensor& x, int64_t dim, const std::vector<int64_t>& ends, int cp, int rank) {
  std::vector<at::Tensor> parts;
  for (const auto& span : zigzag_spans(ends, cp, rank)) parts.push_back(x.narrow(dim, span.first, span.count));
  return at::cat(parts, dim);
}

std::vector<int64_t> zigzag_order(const std::vector<int64_t>& ends, int cp) {
  std::vector<int64_t> order(static_cast<size_t>(ends.back()));
  int64_t at = 0;
  for (int rank = 0; rank < cp; ++rank) {
    for (const auto& span : zigzag_spans(ends, cp, rank)) {
      for (int64_t i = 0; i < span.count; ++i) order[static_cast<size_t>(span.first + i)] = at++;
    }
  }
  return order;
}

at::Tensor zigzag_gather(const at::Tensor& part, int64_t dim, const std::vector<int64_t>& ends, const Group& cp) {
  if (cp.size() == 1) return part;
  const auto all = cp.all_gather(part.movedim(dim, 0));
  const auto order = zigzag_order(ends, cp.size());
  return all.index_select(0, at::tensor(order, at::kLong).to(part.device())).movedim(0, dim);
}

}  // namespace mcore_bridge
