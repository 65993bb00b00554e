// Muon (https://kellerjordan.github.io/posts/muon/): momentum whose matrices are orthogonalised before they are
// applied.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "mcore_bridge/error.h"
#include "train/newton_schulz.h"
#include "train/update_rule.h"

namespace mcore_bridge {
namespace {

/// One of the matrices stacked in a parameter.
struct Part {
  at::Tensor rows;
  bool shared = false;  ///< neighbouring tensor ranks hold the same rows
};

class Muon : public UpdateRule {
 public:
  Muon(const OptimizerOptions& options, ParallelStatePtr parallel)
      : options_(options),
        parallel_(std::move(parallel)),
        newton_schulz_{options.muon_num_ns_steps, options.muon_coefficient_type, options.muon_fp32_matmul_prec} {}

  std::vector<std::pair<std::string, at::ScalarType>> kinds() const override {
    return {{"momentum_buffer", precision(options_.exp_avg_dtype)}};
  }
  bool whole() const override { return true; }

  void apply(const std::vector<Segment*>& segments, const Update& update) const override {
    const auto skip = update.skip.gt(0);
    for (const auto* segment : segments) {
      for (const auto& piece : segment->pieces) {
        const auto sizes = piece.parameter->tensor.sizes();
        auto matrix = [&](const at::Tensor& flat) {
          return flat.narrow(0, piece.offset, piece.end - piece.begin).view(sizes);
        };
        const auto momentum = matrix(segment->states[0].second), master = matrix(segment->master);
        const auto gradient = matrix(segment->gradient()).to(at::kFloat) / update.grad_scale;
        const auto before = momentum.to(at::kFloat);
        const auto after = before.lerp(gradient, 1 - options_.muon_momentum);
        momentum.copy_(at::where(skip, before, after));
        const auto direction = options_.muon_use_nesterov ? gradient.lerp(after, options_.muon_momentum) : after;
        const auto step = orthogonalized(direction, piece.parameter->traits);
        const double lr = update.lr * segment->lr_mult, decay = segment->decays ? update.weight_decay : 0;
        const auto value = master.to(at::kFloat);
        master.copy_(at::where(skip, value, value * (1 - lr * decay) - step * lr));
      }
    }
  }

 private:
  at::Tensor orthogonalized(const at::Tensor& direction, const ParameterTraits& traits) const {
    const auto& widths = traits.parts.widths;
    if (!options_.muon_split_qkv || widths.empty()) return one(direction, traits, traits.shared_rows > 0);
    const auto columns = direction.size(1);
    const auto blocks = direction.view({traits.parts.blocks, -1, columns});
    std::vector<at::Tensor> results;
    int64_t first = 0;
    for (const auto width : widths) {
      const auto part = blocks.narrow(1, first, width).reshape({-1, columns});
      const bool shared = traits.shared_rows > 0 && first >= traits.shared_first_row;
      results.push_back(one(part, traits, shared).view({traits.parts.blocks, width, columns}));
      first += width;
    }
    return at::cat(results, 1).view_as(direction);
  }

  /// One matrix, or this rank's share of it, with the scale of its whole size.
  at::Tensor one(const at::Tensor& part, const ParameterTraits& traits, bool shared) const {
    const auto& tp = traits.expert ? parallel_->etp : parallel_->tp;
    if (!traits.tp_split || options_.muon_tp_mode == "blockwise" || tp.size() == 1)
      return newton_schulz(part, newton_schulz_) * scale(part.size(0), part.size(1));
    const MatrixSplit split{&tp, traits.split_columns ? 1 : 0, shared ? traits.shared_copies : 1};
    auto sizes = part.sizes().vec();
    sizes[split.dim] *= tp.size() / split.copies;
    const auto factor = scale(sizes[0], sizes[1]);
    if (options_.muon_tp_mode == "distributed") return newton_schulz(part, newton_schulz_, split) * factor;
    // duplicated: every rank orthogonalises the whole matrix and keeps its part.
    const auto stacked = tp.all_gather((split.dim == 1 ? part.t() : part).contiguous().unsqueeze(0));
    const auto whole = stacked.slice(0, 0, {}, split.copies).flatten(0, 1);
    const auto result = newton_schulz(whole, newton_schulz_);
    const auto length = part.size(split.dim);
    const auto mine = result.narrow(0, tp.rank() / split.copies * length, length);
    return (split.dim == 1 ? mine.t() : mine) * factor;
  }

  double scale(int64_t rows, int64_t columns) const {
    const auto r = static_cast<double>(rows), c = static_cast<double>(columns);
    const double mode = options_.muon_scale_mode == "spectral"        ? std::sqrt(std::max(r, c))
                        : options_.muon_scale_mode == "unit_rms_norm" ? std::sqrt(r / c)
                                                                      : std::sqrt(std::max(1.0, r / c));
    return mode * options_.muon_extra_scale_factor;
  }

  OptimizerOptions options_;
  ParallelStatePtr parallel_;
  NewtonSchulzOptions newton_schulz_;
};

}  // namespace

std::unique_ptr<UpdateRule> make_muon(const OptimizerOptions& options, ParallelStatePtr parallel) {
  return std::make_unique<Muon>(options, std::move(parallel));
}

}  // namespace mcore_bridge
