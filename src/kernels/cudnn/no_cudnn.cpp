// Stands in for attention.cpp in a build without cuDNN's headers.
#include "kernels/cudnn/attention.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge::cudnn {
namespace {
[[noreturn]] void missing() { fail("this build has no cuDNN attention"); }
}  // namespace

bool available() { return false; }
int64_t workspace(const Attention&, bool) { missing(); }
void forward(const Attention&, const Tensors&, void*, void*) { missing(); }
void backward(const Attention&, const Tensors&, void*, void*) { missing(); }
}  // namespace mcore_bridge::cudnn
