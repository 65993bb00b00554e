// Megatron's learning-rate schedules.
#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

#include "mcore_bridge/error.h"
#include "mcore_bridge/trainer.h"

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

void one_of(const char* field, const std::string& value, std::initializer_list<const char*> allowed) {
  std::string list;
  for (const auto* word : allowed) {
    if (value == word) return;
    list += (list.empty() ? "" : ", ") + std::string(word);
  }
  fail(field, ": '", value, "' is not one of ", list);
}

}  // namespace

void OptimizerOptions::validate() const {
  one_of("lr_decay_style", lr_decay_style, {"constant", "linear", "cosine", "inverse-square-root", "WSD"});
  one_of("lr_wsd_decay_style", lr_wsd_decay_style, {"linear", "cosine", "exponential", "minus_sqrt"});
  auto at_least = [](const char* field, double value, double least) {
    MCB_CHECK(std::isfinite(value) && value >= least, field, ": ", value, " must be a number of at least ", least);
  };
  at_least("lr", lr, 0);
  at_least("min_lr", min_lr, 0);
  at_least("lr_warmup_init", lr_warmup_init, 0);
  at_least("weight_decay", weight_decay, 0);
  at_least("clip_grad", clip_grad, 0);
  at_least("adam_eps", adam_eps, 0);
  MCB_CHECK(min_lr <= lr, "min_lr: ", min_lr, " is above lr ", lr);
  MCB_CHECK(lr_warmup_init <= lr, "lr_warmup_init: ", lr_warmup_init, " is above lr ", lr);
  MCB_CHECK(adam_beta1 >= 0 && adam_beta1 < 1, "adam_beta1: ", adam_beta1, " must be in [0, 1)");
  MCB_CHECK(adam_beta2 >= 0 && adam_beta2 < 1, "adam_beta2: ", adam_beta2, " must be in [0, 1)");
  MCB_CHECK(train_iters >= 0 && lr_decay_iters >= 0 && lr_warmup_iters >= 0 && lr_wsd_decay_iters >= 0,
            "train_iters, lr_decay_iters, lr_warmup_iters and lr_wsd_decay_iters must not be negative");
  const auto decay = lr_decay_iters ? lr_decay_iters : train_iters;
  MCB_CHECK(lr_decay_style == "constant" || decay > 0, "train_iters: the learning-rate schedule '", lr_decay_style,
            "' needs train_iters or lr_decay_iters");
  MCB_CHECK(lr_decay_style == "constant" || lr_warmup_iters < decay, "lr_warmup_iters: ", lr_warmup_iters,
            " leaves nothing of the ", decay, " iterations to decay");
  MCB_CHECK(lr_decay_style != "WSD" || (lr_wsd_decay_iters > 0 && lr_wsd_decay_iters <= decay),
            "lr_wsd_decay_iters: ", lr_wsd_decay_iters, " must be between 1 and the ", decay,
            " iterations of the schedule");
}

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

}  // namespace mcore_bridge
