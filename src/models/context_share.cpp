#include "models/context_share.h"

#include <ATen/ATen.h>

#include "mcore_bridge/error.h"
#include "parallel/zigzag.h"

namespace mcore_bridge {

std::vector<int64_t> document_ends(const ForwardInput& whole) {
  return whole.packed ? whole.packed->cu_seqlens_host : std::vector<int64_t>{0, whole.input_ids.size(1)};
}

bool padded_on_the_right(const at::Tensor& mask) {
  const auto tokens = mask.ne(0);
  return !tokens.slice(1, 1).logical_and(tokens.slice(1, 0, -1).logical_not()).any().item<bool>();
}

void check_right_padding(const at::Tensor& mask, const std::string& what) {
  MCB_CHECK(mask.dim() == 2, what,
            ": with context parallelism attention_mask must be [b, s] with 1 for tokens and 0 for ", "padding, found ",
            mask.sizes(), "; general masks need context_parallel_size 1");
  MCB_CHECK(
      padded_on_the_right(mask), what,
      ": with context parallelism attention_mask may only mark padding on the right of the tokens; pad there, or use ",
      "packed_seq_params");
}

void check_context_share(const ForwardInput& whole, const ModelConfig& config, const ParallelState& parallel,
                         const std::string& what) {
  const auto ends = document_ends(whole);
  MCB_CHECK(!ends.empty(), what, ": packed.cu_seqlens_host is empty; give where documents end on the host, too");
  MCB_CHECK(ends.back() == whole.input_ids.size(1), what, ": cu_seqlens ends at ", ends.back(), ", the row holds ",
            whole.input_ids.size(1), " tokens");
  const int cp = parallel.cp.size(), tp = config.sequence_parallel ? parallel.tp.size() : 1;
  if (cp > 1) check_zigzag(ends, cp, what);
  MCB_CHECK(whole.input_ids.size(1) / cp % tp == 0, what, ": with sequence_parallel the ", whole.input_ids.size(1),
            " positions", cp > 1 ? " / context_parallel_size " + std::to_string(cp) : "",
            " must divide by tensor_model_parallel_size ", tp, "; pad the row");
  if (cp > 1 && whole.attention_mask.defined()) check_right_padding(whole.attention_mask, what);
}

ForwardInput context_share(const ForwardInput& whole, const ParallelState& parallel) {
  const int cp = parallel.cp.size();
  if (cp == 1) return whole;
  const auto ends = document_ends(whole);
  auto part = whole;
  for (auto* tensor : {&part.input_ids, &part.labels, &part.position_ids}) {
    if (tensor->defined()) *tensor = zigzag_slice(*tensor, 1, ends, cp, parallel.cp.rank());
  }
  part.attention_mask = at::Tensor();
  return part;
}

}  // namespace mcore_bridge
