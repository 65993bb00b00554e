// Counts what tensors on the CPU take, as a GPU's caching allocator does for its device.
#pragma once

#include <cstdint>

namespace mcore_bridge {

/// Bytes of CPU tensors made since count_cpu_memory() began.
struct CpuMemory {
  int64_t allocated = 0;  ///< alive now
  int64_t peak = 0;       ///< most alive at once since the last reset_peak_cpu_memory()
};

/// From here on every CPU tensor of this process is counted, whichever thread makes or frees it. Stays on.
void count_cpu_memory();
CpuMemory cpu_memory();
void reset_peak_cpu_memory();

}  // namespace mcore_bridge
