// The factor on the loss that keeps small float16 gradients from vanishing.
#pragma once

#include "mcore_bridge/model_config.h"
#include "mcore_bridge/optimizer_options.h"

namespace mcore_bridge {

/// Halves after `hysteresis` bad steps, doubles after loss_scale_window good ones in a row, as Megatron does.
class LossScaler {
 public:
  /// `half`: the model computes in float16; the scale is 1 otherwise.
  LossScaler(const OptimizerOptions& options, bool half);
  double scale() const { return scale_; }
  /// Non-finite gradients mean a step to skip, not a failure.
  bool skips() const { return half_; }
  /// It cannot go down any further: the gradients themselves are broken.
  bool exhausted() const { return dynamic_ && scale_ <= min_scale_; }
  void update(bool finite);
  Json scalars() const;
  void set_scalars(const Json& values);

 private:
  bool half_, dynamic_;
  double scale_, min_scale_;
  int64_t window_, hysteresis_;
  int64_t good_ = 0, left_;  ///< good steps in a row; bad steps until it halves
};

}  // namespace mcore_bridge
