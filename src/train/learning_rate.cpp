// Megatron's schedules of learning rate and weight decay.
#include <algorithm>
#include <cmath>
#include <numbers>

#include "mcore_bridge/optimizer_options.h"

namespace mcore_bridge {
namespace {

double cosine(double ratio) { return 0.5 * (std::cos(std::numbers::pi * ratio) + 1); }

/// Share of the way between min_lr and lr at `ratio` of the WSD tail.
double wsd_tail(const std::string& style, double ratio) {
  if (style == "linear") return 1 - ratio;
  if (style == "cosine") return cosine(ratio);
  if (style == "minus_sqrt") return 1 - std::sqrt(ratio);
  return 2 * std::pow(0.5, ratio) - 1;
}

}  // namespace

double learning_rate(const OptimizerOptions& o, int64_t iteration) {
  // Megatron's scheduler has counted the steps before this one.
  const double step = static_cast<double>(std::max<int64_t>(0, iteration - 1));
  const double warm_up = static_cast<double>(o.lr_warmup_iters),
               decay = static_cast<double>(o.lr_decay_iters ? o.lr_decay_iters : o.train_iters);
  if (warm_up > 0 && step <= warm_up) return o.lr_warmup_init + (o.lr - o.lr_warmup_init) * step / warm_up;
  if (o.lr_decay_style == "constant") return o.lr;
  if (step > decay) return o.min_lr;
  if (o.lr_decay_style == "inverse-square-root") {
    return std::max(o.min_lr, o.lr * std::sqrt(std::max(warm_up, 1.0)) / std::sqrt(std::max(step, 1.0)));
  }
  const double ratio = (step - warm_up) / (decay - warm_up);
  double share = 0;
  if (o.lr_decay_style == "linear") {
    share = 1 - ratio;
  } else if (o.lr_decay_style == "cosine") {
    share = cosine(ratio);
  } else {
    const double tail = static_cast<double>(o.lr_wsd_decay_iters), start = decay - tail;
    share = step <= start ? 1.0 : wsd_tail(o.lr_wsd_decay_style, (step - start) / tail);
  }
  return o.min_lr + share * (o.lr - o.min_lr);
}

double weight_decay(const OptimizerOptions& o, int64_t iteration) {
  if (o.weight_decay_incr_style == "constant") return o.weight_decay;
  const double step = static_cast<double>(std::max<int64_t>(0, iteration - 1)),
               all = static_cast<double>(o.train_iters);
  if (step > all) return o.end_weight_decay;
  const double ratio = all > 0 ? step / all : 1;
  const double share = o.weight_decay_incr_style == "linear" ? ratio : cosine(1 - ratio);
  return o.start_weight_decay + share * (o.end_weight_decay - o.start_weight_decay);
}

}  // namespace mcore_bridge
