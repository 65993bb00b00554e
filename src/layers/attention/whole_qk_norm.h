// One RMSNorm over all query heads together and one over all key heads, of all tensor-parallel ranks (OLMoE, MiniMax).
#pragma once

#include "kernels/rms_norm.h"
#include "parallel/group.h"
#include "plan/weight_rule.h"

namespace mcore_bridge {

struct WholeQkNormOptions {
  HeadLayout local;    ///< this rank's heads
  int64_t heads = 0;   ///< of all ranks
  int64_t groups = 0;  ///< of all ranks
  Group tp;            ///< holds all heads; key heads several times when there are fewer than ranks
  RmsNormOptions norm;
  int64_t copies() const;  ///< ranks that hold the same key heads
};

/// The fused row [s, b, groups * (heads per group + 2) * d] with its query and key heads normalised. Weights are those
/// of this rank's heads, [heads * d] and [groups * d]. Collective over `tp`, one number a token and norm, and again in
/// backward. Keeps its input.
at::Tensor whole_qk_norm(const at::Tensor& mixed_sbh, const at::Tensor& q_weight, const at::Tensor& k_weight,
                         const WholeQkNormOptions& options);

}  // namespace mcore_bridge
