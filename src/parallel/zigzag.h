// How context parallelism cuts sequences: every document into 2 * cp equal chunks, rank r keeping chunks r and
// 2 * cp - 1 - r. Under causal attention early chunks see little and late ones much, so all ranks do equal work.
//
// `ends` are the documents of a row as in cu_seqlens: {0, ..., length of the whole row}.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "parallel/group.h"

namespace mcore_bridge {

struct Span {
  int64_t first = 0, count = 0;
};

/// Throws ValueError, naming `what`, unless every document divides into 2 * cp chunks.
void check_zigzag(const std::vector<int64_t>& ends, int cp, const std::string& what);

/// What `rank` keeps of the whole row, in the order it keeps it.
std::vector<Span> zigzag_spans(const std::vector<int64_t>& ends, int cp, int rank);

/// `rank`'s part of x along `dim`.
at::Tensor zigzag_slice(const at::Tensor& x, int64_t dim, const std::vector<int64_t>& ends, int cp, int rank);

/// For every position of the whole row, its index in the parts of all ranks laid one after another.
std::vector<int64_t> zigzag_order(const std::vector<int64_t>& ends, int cp);

/// All ranks' parts along `dim`, in the order of the whole row. Collective over `cp`, no gradients.
at::Tensor zigzag_gather(const at::Tensor& part, int64_t dim, const std::vector<int64_t>& ends, const Group& cp);

}  // namespace mcore_bridge
