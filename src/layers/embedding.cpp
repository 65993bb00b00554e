#include "layers/embedding.h"

#include <ATen/ATen.h>

#include "layers/weight_gradients.h"
#include "mcore_bridge/error.h"
#include "parallel/collectives.h"

namespace mcore_bridge {
namespace {

at::Tensor vocab_matrix(const VocabOptions& options, const ParallelState& parallel, at::TensorOptions tensor_options) {
  return at::empty({options.local_rows(parallel.tp.size()), options.hidden_size}, tensor_options).requires_grad_(true);
}

std::vector<NamedParameter> vocab_parameter(const at::Tensor& weight, const VocabOptions& options,
                                            const ParallelState& parallel) {
  return {{"weight",
           weight,
           {.tp_split = parallel.tp.size() > 1, .tied_embedding = options.tied_over_stages, .vocabulary = true}}};
}

}  // namespace

VocabParallelEmbedding::VocabParallelEmbedding(VocabOptions options, ParallelStatePtr parallel,
                                               at::TensorOptions tensor_options)
    : options_(options), parallel_(std::move(parallel)), weight_(vocab_matrix(options_, *parallel_, tensor_options)) {}

std::vector<NamedParameter> VocabParallelEmbedding::own_parameters() const {
  return vocab_parameter(weight_, options_, *parallel_);
}

at::Tensor VocabParallelEmbedding::forward(const at::Tensor& ids) const {
  const auto ids_sb = ids.t();
  const auto& tp = parallel_->tp;
  if (tp.size() == 1) return at::embedding(weight_, ids_sb);
  const auto first = tp.rank() * weight_.size(0);
  const auto elsewhere = ids_sb.lt(first).logical_or_(ids_sb.ge(first + weight_.size(0)));
  const auto local = (ids_sb - first).masked_fill_(elsewhere, 0);
  const auto partial = at::embedding(weight_, local).masked_fill(elsewhere.unsqueeze(-1), 0);
  return options_.sequence_parallel ? reduce_scatter_sequence(partial, tp) : reduce_from_region(partial, tp);
}

OutputLayer::OutputLayer(VocabOptions options, ParallelStatePtr parallel, at::TensorOptions tensor_options,
                         bool own_weight)
    : options_(options), parallel_(std::move(parallel)) {
  if (own_weight) weight_ = vocab_matrix(options_, *parallel_, tensor_options);
}

std::vector<NamedParameter> OutputLayer::own_parameters() const {
  if (!weight_.defined()) return {};
  return vocab_parameter(weight_, options_, *parallel_);
}

at::Tensor OutputLayer::forward(const at::Tensor& x_sbh, const at::Tensor& tied) const {
  const auto& tp = parallel_->tp;
  const auto x = options_.sequence_parallel ? gather_sequence(x_sbh, tp) : copy_to_region(x_sbh, tp);
  return linear_map(x, weight(tied));
}

Footprint VocabParallelEmbedding::footprint(const ActivationShape& shape) const {
  const auto tp = parallel_->tp.size();
  const auto tokens = shape.tokens(), whole = tokens * options_.hidden_size * shape.element;
  Footprint result{.output_grad = weight_.requires_grad()};
  if (options_.sequence_parallel) {
    result.tensor_forward = Traffic::reduce_scatter(whole, tp);
    if (weight_.requires_grad()) result.tensor_backward = Traffic::all_gather(whole, tp);
  } else {
    result.tensor_forward = Traffic::all_reduce(whole, tp);
  }
  if (weight_.requires_grad()) {
    result.saved = tokens * (tp > 1 ? 8 + 1 : 8);                                   // ids, and which are elsewhere
    result.workspace = weight_.numel() * shape.element + whole * (tp > 1 ? 2 : 1);  // the dense gradient
  }
  return result;
}

Footprint OutputLayer::footprint(const ActivationShape& shape, bool tied_grad) const {
  const auto tp = parallel_->tp.size();
  const bool split = options_.sequence_parallel && tp > 1;
  const bool weight_grad = weight_.defined() ? weight_.requires_grad() : tied_grad;
  const auto tokens = shape.tokens(), whole = tokens * options_.hidden_size * shape.element;
  const auto matrix = columns() * options_.hidden_size;
  const auto flops = 2.0 * static_cast<double>(tokens) * static_cast<double>(matrix);
  Footprint result{.forward_flops = flops,
                   .backward_flops = flops * ((shape.input_grad ? 1 : 0) + (weight_grad ? 1 : 0)),
                   .output_grad = shape.input_grad || weight_grad};
  if (split) result.tensor_forward = Traffic::all_gather(whole, tp);
  if (shape.input_grad)
    result.tensor_backward = split ? Traffic::reduce_scatter(whole, tp) : Traffic::all_reduce(whole, tp);
  if (shape.training_loss) {
    // The gradient of the input waits for backward; the matrix's is in its main gradient already.
    result.saved = shape.input_grad ? whole : 0;
  } else {
    if (weight_grad && (split || !shape.input_kept)) result.saved = whole;
    result.workspace = tokens * columns() * shape.element + whole + (weight_grad ? matrix * shape.element : 0);
  }
  return result;
}

}  // namespace mcore_bridge
