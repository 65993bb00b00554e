// A chunk of a decoder model on this rank: the layers one (virtual) pipeline stage holds.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mcore_bridge/lora.h"
#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

class Module;
struct ParallelState;
using ParallelStatePtr = std::shared_ptr<const ParallelState>;

/// Several documents in one row: tokens [cu_seqlens[i], cu_seqlens[i+1]) are document i. With context parallelism each
/// is padded to a multiple of 2 * context_parallel_size, and cu_seqlens count the whole row, not a rank's part.
struct PackedSeqParams {
  at::Tensor cu_seqlens;                 ///< int32 [documents + 1], on the model's device
  std::vector<int64_t> cu_seqlens_host;  ///< the same on the host; empty: the device alone knows (recorded work)
  int64_t max_seqlen = 0;
};

/// Context parallelism: `forward` takes this rank's part of the sequence (see zigzag.h; split_cp_inputs in Python) and
/// returns that part's results; Trainer and forward_all_stages take whole sequences.
struct ForwardInput {
  at::Tensor input_ids;     ///< int64 [b, s]; may be undefined after the first stage
  at::Tensor position_ids;  ///< int64 [b, s]; undefined: 0..s-1 (or per document when packed)
  at::Tensor
      attention_mask;  ///< undefined: causal; [b, s] 1 = token, 0 = padding; or bool [b, 1, s, s] with true = masked
  at::Tensor labels;   ///< int64 [b, s]; -100: no loss; undefined: return logits
  /// With labels: what each token's loss counts, a float64 scalar on the model's device. forward then returns the
  /// weighted sum of all losses instead of the losses, and never holds the logits: it makes the head's gradients on the
  /// way, so backward of that sum is to be given 1.
  at::Tensor loss_weight;
  /// Mixture of experts: what this micro-batch's balance losses count beside its loss.
  double balance_loss_share = 1;
  at::Tensor hidden;  ///< [s (/ tp with sequence parallelism), b, h] from the previous stage
  std::optional<PackedSeqParams> packed;
};

class GPTModel;

/// Builds one chunk. Parameters are empty until weights are loaded or `initialize` ran.
/// `device`: where parameters live ("cpu", "cuda:0", "meta").
std::shared_ptr<GPTModel> build_model(const ModelConfig& config, ParallelStatePtr parallel, int vp_stage = 0,
                                      const std::string& device = "cpu");
/// One rank, no process group.
std::shared_ptr<GPTModel> build_model(const ModelConfig& config, const std::string& device = "cpu");

/// The chunk's output: hidden states [s', b, h] before the last stage; per-token loss [b, s] when labels are given
/// (with loss_weight their weighted sum, a float64 scalar); else logits [b, s, vocab / tp] (this rank's slice) or [b,
/// s, vocab] when `gather_output`.
at::Tensor forward(GPTModel& model, const ForwardInput& input, bool gather_output = false);

/// Runs `input` through every pipeline stage and returns the last stage's output on all of them: whole logits [b, s,
/// vocab], or per-token losses [b, s] when labels are given. Collective; no gradients.
at::Tensor forward_all_stages(const std::vector<std::shared_ptr<GPTModel>>& chunks, const ForwardInput& input);

}  // namespace mcore_bridge
