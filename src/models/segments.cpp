// GPTModel::segments: the chunk's footprint, piece by piece.
#include <algorithm>

#include "layers/cross_entropy.h"
#include "models/gpt_model.h"

namespace mcore_bridge {

std::vector<GPTModel::Segment> GPTModel::segments(const ActivationShape& shape) const {
  const auto tp = parallel_->tp.size();
  const auto split = config_.sequence_parallel ? tp : 1;
  const auto hidden = shape.tokens() / split * config_.hidden_size * shape.element;
  std::vector<Segment> result;
  auto here = shape;
  if (embedding_) {
    const auto embedding = embedding_->footprint(here);
    result.push_back({"embedding", 0, embedding, embedding.saved});
    here.input_grad = result.back().footprint.output_grad;
  } else {
    here.input_grad = true;
  }
  // cos and sin, kept by every layer alike.
  int64_t table = rope_ ? 2 * shape.tokens() * rope_->rotated() / 2 * shape.element : 0;

  const auto count = static_cast<int64_t>(layers_.size()), given = config_.recompute_num_layers.value_or(1);
  const bool again = config_.recompute_granularity == "full", block = config_.recompute_method == "block";
  const auto unit = again && !block ? given : 1;
  const auto recomputed = !again ? 0 : block ? std::min(given, count) : count;
  const auto offloaded = config_.cpu_offloading ? std::min(count, config_.cpu_offloading_num_layers) : 0;
  if (recomputed > 0) here.input_grad = true;
  for (int64_t first = 0; first < count; first += unit) {
    const auto end = std::min(count, first + unit);
    const bool redo = first < recomputed;
    Footprint sum{.output_grad = here.input_grad};
    for (auto i = first; i < end; ++i) {
      auto inside = here;
      inside.input_grad = sum.output_grad;
      inside.input_kept = redo && i == first;
      const auto layer = layers_[static_cast<size_t>(i)]->footprint(inside);
      const bool grad = inside.input_grad || layer.output_grad;
      sum += layer;
      sum.output_grad = grad;
    }
    const auto produced = sum.saved;
    if (redo) sum.recompute(hidden);
    if (first >= offloaded || !sum.output_grad) sum.offloaded = 0;
    if (sum.output_grad) {
      sum.saved += table;
      table = 0;
    }
    here.input_grad = sum.output_grad;
    result.push_back({"layers", end - first, sum, produced});
  }
  if (!output_) return result;

  auto local = here;
  local.sequence /= split;
  Footprint head = final_norm_->footprint(local);
  here.input_grad = head.output_grad;
  const bool tied_grad = embedding_ && embedding_->weight().requires_grad();
  here.input_kept = false;
  head += output_->footprint(here, tied_grad);
  if (head.output_grad) {
    // The head's forward beside what it keeps: its input, gathered where it is split, and logits.
    const auto backward = head.workspace, input = hidden + (split > 1 ? hidden * split : 0);
    const auto loss = cross_entropy_footprint(output_->columns(), tp, here);
    head += loss;
    head.workspace = std::max(backward, loss.workspace + input);
  }
  result.push_back({"head", 0, head, head.saved});
  return result;
}

}  // namespace mcore_bridge
