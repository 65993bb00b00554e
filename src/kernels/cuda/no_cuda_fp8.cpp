// Stands in for the FP8 .cu files in a build without CUDA.
#include "kernels/cuda/fp8.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge::cuda {
namespace {
[[noreturn]] void missing() { fail("this build has no CUDA kernels; build with MCB_CUDA=ON"); }
}  // namespace

void fp8_amax(const void*, int64_t, float*, Type, Stream) { missing(); }
void fp8_quantize(const Fp8Quantize&, Type, Stream) { missing(); }
void fp8_turn(const Fp8Turn&, Stream) { missing(); }
void fp8_parts_amax(const Fp8Parts&, Type, Stream) { missing(); }
void fp8_parts_quantize(const Fp8Parts&, Type, Stream) { missing(); }
void fp8_scales(const Fp8Scales&, Stream) { missing(); }
void fp8_matmul(const Fp8Matmul&, Type, Stream) { missing(); }
int compute_capability() { missing(); }
bool fp8_has_blocks() { return false; }
}  // namespace mcore_bridge::cuda
