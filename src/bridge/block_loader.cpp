#include "bridge/block_loader.h"

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "bridge/region_blocks.h"

namespace mcore_bridge {

at::Tensor BlockLoader::staging(Staging& slot, int64_t bytes, bool pinned) {
  if (slot.copied) {
    slot.copied->synchronize();
    slot.copied.reset();
  }
  if (!slot.bytes.defined() || slot.bytes.numel() < bytes) {
    slot.bytes = at::Tensor();
    slot.bytes = at::empty({std::max(bytes, kBlockBytes)}, at::TensorOptions().dtype(at::kByte).pinned_memory(pinned));
  }
  return slot.bytes.narrow(0, 0, bytes);
}

void BlockLoader::load(const TensorSource& source, const Box& box, at::Tensor target) {
  const auto dtype = source.dtype();
  const bool on_cpu = target.is_cpu();
  if (on_cpu && target.scalar_type() == dtype && target.is_contiguous()) {
    source.read(box, target.mutable_data_ptr());
    return;
  }
  auto& slot = slots_[next_];
  const auto bytes = staging(slot, box.numel() * static_cast<int64_t>(c10::elementSize(dtype)), !on_cpu);
  source.read(box, bytes.mutable_data_ptr());
  const auto values = bytes.view(dtype).view(target.sizes());
  if (on_cpu) {
    copy_on_this_thread(target, values);
    return;
  }
  const c10::DeviceGuard guard(target.device());
  target.copy_(values.to(target.device(), /*non_blocking=*/true));
  slot.copied.emplace(target.device().type());
  slot.copied->record(c10::impl::VirtualGuardImpl(target.device().type()).getStream(target.device()));
  next_ = 1 - next_;
}

void BlockLoader::finish() {
  for (auto& slot : slots_) {
    if (slot.copied) slot.copied->synchronize();
    slot.copied.reset();
  }
}

BlockLoader::~BlockLoader() {
  try {
    finish();
  } catch (...) {  // after a device error nothing is worth waiting for
  }
}

}  // namespace mcore_bridge
