#include "layers/offload.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <map>
#include <mutex>
#include <optional>
#include <unordered_set>

namespace mcore_bridge {
namespace {

thread_local ActivationOffload::Block* collecting = nullptr;

/// The stream copies run on, one per device; null on the CPU.
std::optional<c10::Stream> copy_stream(c10::Device device) {
  if (device.is_cpu()) return std::nullopt;
  static std::mutex mutex;
  static std::map<c10::Device, c10::Stream,
                  decltype([](c10::Device a, c10::Device b) { return a.index() < b.index(); })>
      streams;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = streams.find(device);
  if (found == streams.end()) {
    const c10::impl::VirtualGuardImpl guard(device.type());
    found = streams.emplace(device, guard.getStreamFromGlobalPool(device)).first;
  }
  return found->second;
}

at::Tensor bytes_of(const c10::Storage& storage) {
  return at::empty({0}, at::TensorOptions(storage.device()).dtype(at::kByte))
      .set_(storage, 0, {static_cast<int64_t>(storage.nbytes())}, {1});
}

/// Whether nothing but this tensor (and the base it is a view of) keeps its memory.
bool is_last_holder(const at::Tensor& tensor) {
  const bool with_base = tensor.is_view() && tensor._base().use_count() == 1;
  return tensor.use_count() == 1 && tensor.storage().use_count() == (with_base ? 2 : 1);
}

/// `copy` on the copy stream, behind what the current stream has done so far; `memory` is not reused before it is done.
template <class Copy>
void beside(c10::Device device, const c10::Storage& memory, Copy copy) {
  const auto stream = copy_stream(device);
  if (!stream) return copy();
  const c10::impl::VirtualGuardImpl guard(device.type());
  c10::Event ready(device.type());
  ready.record(guard.getStream(device));
  ready.block(*stream);
  {
    const c10::StreamGuard on(*stream);
    copy();
  }
  guard.recordDataPtrOnStream(memory.data_ptr(), *stream);
}

}  // namespace

/// The storages of one block: on the device, on their way, or on the host.
class OffloadedBlock {
 public:
  explicit OffloadedBlock(const std::vector<at::Tensor>& tensors, std::shared_ptr<OffloadedBlock> before)
      : before_(std::move(before)) {
    std::unordered_set<const c10::StorageImpl*> seen;
    for (const auto& tensor : tensors) {
      if (tensor.nbytes() == 0 || !seen.insert(tensor.storage().unsafeGetStorageImpl()).second) continue;
      if (is_last_holder(tensor)) continue;  // nobody's backward reads it
      Item item{tensor.storage(), {}, {}};
      item.host = at::empty({static_cast<int64_t>(item.storage.nbytes())},
                            at::TensorOptions(at::kCPU).dtype(at::kByte).pinned_memory(!tensor.is_cpu()));
      beside(tensor.device(), item.storage, [&] { item.host.copy_(bytes_of(item.storage), /*non_blocking=*/true); });
      item.storage.set_data_ptr_noswap(c10::DataPtr(nullptr, tensor.device()));
      items_.push_back(std::move(item));
    }
  }

  void start_return() {
    if (started_) return;
    started_ = true;
    for (auto& item : items_) {
      item.back = at::empty(item.host.sizes(), item.host.options().device(item.storage.device()).pinned_memory(false));
      beside(item.storage.device(), item.back.storage(), [&] { item.back.copy_(item.host, /*non_blocking=*/true); });
    }
  }

  void finish_return() {
    start_return();
    if (!items_.empty()) {
      const auto device = items_[0].storage.device();
      if (const auto stream = copy_stream(device)) {
        const c10::impl::VirtualGuardImpl guard(device.type());
        c10::Event done(device.type());
        done.record(*stream);
        done.block(guard.getStream(device));
      }
    }
    for (auto& item : items_) {
      auto fresh = item.back.storage();
      item.storage.set_data_ptr_noswap(fresh.set_data_ptr(c10::DataPtr(nullptr, item.storage.device())));
    }
    items_.clear();
    if (before_) before_->start_return();
    before_.reset();
  }

 private:
  struct Item {
    c10::Storage storage;
    at::Tensor host, back;
  };
  std::vector<Item> items_;
  std::shared_ptr<OffloadedBlock> before_;
  bool started_ = false;
};

void ActivationOffload::keep(const at::Tensor& tensor) {
  if (collecting && at::GradMode::is_enabled() && tensor.defined()) collecting->kept_.push_back(tensor);
}

ActivationOffload::Block::Block() : outer_(collecting) { collecting = this; }
ActivationOffload::Block::~Block() { collecting = outer_; }

std::shared_ptr<OffloadedBlock> ActivationOffload::Block::leave(const at::Tensor& y,
                                                                std::shared_ptr<OffloadedBlock> before) {
  auto block = std::make_shared<OffloadedBlock>(kept_, std::move(before));
  kept_.clear();
  y.register_hook([block](const at::Tensor& grad) {
    block->finish_return();
    return grad;
  });
  return block;
}

}  // namespace mcore_bridge
