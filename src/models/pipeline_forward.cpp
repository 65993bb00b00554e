// A forward pass over all pipeline stages without a schedule: for inference and checks.
#include <ATen/ATen.h>

#include "mcore_bridge/error.h"
#include "models/context_share.h"
#include "models/gpt_model.h"
#include "parallel/zigzag.h"

namespace mcore_bridge {

at::Tensor forward_all_stages(const std::vector<std::shared_ptr<GPTModel>>& chunks, const ForwardInput& whole) {
  MCB_CHECK(!chunks.empty(), "forward: no model given");
  MCB_CHECK(whole.input_ids.defined() && whole.input_ids.dim() == 2, "forward: input_ids [b, s] is needed");
  at::NoGradGuard no_grad;
  const auto& config = chunks[0]->config();
  const auto& parallel = chunks[0]->parallel();
  check_context_share(whole, config, parallel, "forward");
  const auto input = context_share(whole, parallel);
  const auto batch = input.input_ids.size(0), length = input.input_ids.size(1);
  const auto fp = at::TensorOptions(chunks[0]->device()).dtype(config.params_dtype);
  const auto stages = parallel.pp.size(), stage = parallel.pp.rank();
  const auto local_length = config.sequence_parallel ? length / parallel.tp.size() : length;

  auto staged = input;
  at::Tensor output;
  std::shared_ptr<Group::Pending> pending;
  for (size_t chunk = 0; chunk < chunks.size(); ++chunk) {
    const bool first = stage == 0 && chunk == 0, last = stage == stages - 1 && chunk + 1 == chunks.size();
    if (!first && stages > 1) {
      staged.hidden = at::empty({local_length, batch, config.hidden_size}, fp);
      parallel.pp.exchange({{staged.hidden, (stage + stages - 1) % stages, false}});
    } else if (!first) {
      staged.hidden = output;
    }
    output = chunks[chunk]->forward(staged, /*gather_output=*/true);
    if (!last && stages > 1) pending = parallel.pp.exchange({{output.contiguous(), (stage + 1) % stages, true}});
  }
  if (output.defined() && stage == stages - 1)
    output = zigzag_gather(output, 1, document_ends(whole), parallel.cp).contiguous();
  if (stages == 1) return output;
  if (stage != stages - 1) {
    const auto all = whole.input_ids.size(1);
    output = whole.labels.defined() ? at::empty({batch, all}, fp.dtype(at::kFloat))
                                    : at::empty({batch, all, config.padded_vocab_size}, fp);
  }
  output = output.contiguous();
  parallel.pp.broadcast(output, stages - 1);
  return output;
}

}  // namespace mcore_bridge
