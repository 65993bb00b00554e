#include "train/loss_scaler.h"

#include <algorithm>

namespace mcore_bridge {

LossScaler::LossScaler(const OptimizerOptions& options, bool half)
    : half_(half),
      dynamic_(half && options.loss_scale == 0),
      scale_(!half      ? 1
             : dynamic_ ? options.initial_loss_scale
                        : options.loss_scale),
      min_scale_(options.min_loss_scale),
      window_(options.loss_scale_window),
      hysteresis_(options.hysteresis),
      left_(options.hysteresis) {}

void LossScaler::update(bool finite) {
  if (!dynamic_) return;
  if (finite) {
    if (++good_ < window_) return;
    good_ = 0;
    left_ = hysteresis_;
    scale_ *= 2;
  } else {
    good_ = 0;
    if (--left_ <= 0) scale_ = std::max(scale_ / 2, min_scale_);
  }
}

Json LossScaler::scalars() const {
  if (!dynamic_) return Json::object();
  return {{"loss_scale", scale_}, {"growth_tracker", good_}, {"hysteresis_tracker", left_}};
}

void LossScaler::set_scalars(const Json& values) {
  if (!dynamic_) return;
  scale_ = values.value("loss_scale", scale_);
  good_ = values.value("growth_tracker", good_);
  left_ = values.value("hysteresis_tracker", left_);
}

}  // namespace mcore_bridge
