#include "core/cpu_memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <unordered_map>

namespace mcore_bridge {
namespace {

std::atomic<int64_t> allocated{0}, peak{0};

/// The allocator before ours, which does the work.
c10::Allocator* inner = nullptr;

// Kernels that ask for raw memory want the data pointer to be all that frees it, so sizes stand beside.
std::mutex mutex;
std::unordered_map<void*, int64_t>& sizes() {
  static auto& map = *new std::unordered_map<void*, int64_t>;  // outlives every tensor
  return map;
}

void release(void* data) {
  if (data == nullptr) return;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = sizes().find(data);
    allocated -= found->second;
    sizes().erase(found);
  }
  inner->raw_deallocate(data);
}

class CountingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto* data = inner->raw_allocate(bytes);
    if (data != nullptr) {
      const std::lock_guard<std::mutex> lock(mutex);
      sizes()[data] = static_cast<int64_t>(bytes);
      allocated += static_cast<int64_t>(bytes);
      peak = std::max(peak.load(), allocated.load());
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

void count_cpu_memory() {
  static std::once_flag once;
  std::call_once(once, [] {
    inner = c10::GetCPUAllocator();
    c10::SetCPUAllocator(new CountingAllocator, /*priority=*/1);  // lives as long as the tensors: for ever
  });
}

CpuMemory cpu_memory() { return {allocated, peak}; }

void reset_peak_cpu_memory() { peak = allocated.load(); }

}  // namespace mcore_bridge
