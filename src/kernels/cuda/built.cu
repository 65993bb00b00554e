#include "launch.h"

namespace mcore_bridge::cuda {
bool built() { return true; }
}  // namespace mcore_bridge::cuda
