// Stands in for the .cu files in a build without CUDA.
#include "kernels/cuda/launch.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge::cuda {
namespace {
[[noreturn]] void missing() { fail("this build has no CUDA kernels; build with MCB_CUDA=ON"); }
}  // namespace

bool built() { return false; }
void rms_norm_forward(const RmsNorm&, Type, Stream) { missing(); }
void rms_norm_apply(const RmsNorm&, Type, Stream) { missing(); }
void rms_norm_backward(const RmsNormBackward&, Type, Stream) { missing(); }
void split_qkv_forward(const SplitQkv&, Type, Stream) { missing(); }
void split_qkv_backward(const SplitQkvBackward&, Type, Stream) { missing(); }
void gated_forward(const Gated&, Type, Stream) { missing(); }
void gated_backward(const Gated&, Type, Stream) { missing(); }
void cross_entropy_statistics(const CrossEntropy&, Type, Stream) { missing(); }
void cross_entropy_gradient(const CrossEntropy&, Type, Stream) { missing(); }
void cross_entropy_both(const CrossEntropy&, Type, Stream) { missing(); }
void expand_b(const LoraB&, Type, Stream) { missing(); }
void collect_b(const LoraB&, Type, Type, Stream) { missing(); }
void spread_rows(const PermuteRows&, Type, Stream) { missing(); }
void combine_rows(const PermuteRows&, Type, Stream) { missing(); }
void sum_of_squares(const Squares&, Type, Stream) { missing(); }
void adamw(const AdamW&, const AdamWTypes&, Stream) { missing(); }
}  // namespace mcore_bridge::cuda
