// A forward pass over all pipeline stages without a schedule: for inference and checks.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

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
  std::vector<std::shared_ptr<Group::Transfer>> sends;
  const int previous = (stage + stages - 1) % stages, next = (stage + 1) % stages;
  for (size_t chunk = 0; chunk < chunks.size(); ++chunk) {
    auto& model = *chunks[chunk];
    if (!model.place().pre_process) {
      staged.hidden = at::empty({local_length, batch, config.hidden_size}, fp);
      parallel.way(previous, stage).receive(staged.hidden, previous)->wait();
    }
    output = model.forward(staged, /*gather_output=*/true);
    if (!model.place().post_process) sends.push_back(parallel.way(stage, next).send(output.contiguous(), next));
  }
  for (const auto& send : sends) send->wait();
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
