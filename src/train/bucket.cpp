#include "train/bucket.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <utility>

namespace mcore_bridge {
namespace {

// torch before 2.13 cannot take back the error that a storage without memory gives: none is set there.
template <class Impl>
void set_error(Impl* storage, const char* error) {
  if constexpr (requires { storage->clear_data_ptr_access_error_msg_(); }) {
    if (error) {
      storage->release_data_and_set_meta_custom_data_ptr_error_msg_(error);
    } else {
      storage->clear_data_ptr_access_error_msg_();
    }
  }
}

// The parameters are views of the flat buffer's storage, and graphs hold such views: its memory comes and goes below
// them. Whoever reads them in between gets an error.
void give_memory(const at::Tensor& tensor) {
  const auto& storage = tensor.storage();
  const auto bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
  if (storage.nbytes() == bytes) return;
  set_error(storage.unsafeGetStorageImpl(), nullptr);
  storage.set_data_ptr_noswap(storage.allocator()->allocate(bytes));
  storage.set_nbytes(bytes);
}

void take_memory(const at::Tensor& tensor) {
  const auto& storage = tensor.storage();
  storage.set_data_ptr_noswap(storage.allocator()->allocate(0));
  storage.set_nbytes(static_cast<size_t>(0));
  set_error(storage.unsafeGetStorageImpl(),
            "this parameter is fully sharded and not in place outside the model's forward; read it inside "
            "`with mcore_bridge.materialised(models):` (C++: MaterialisedParameters)");
}

/// Whatever collectives make of FP8, they move bytes.
at::Tensor movable(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat8_e4m3fn ? tensor.view(at::kByte) : tensor;
}

}  // namespace

Bucket::Bucket(const BucketLayout& layout, const std::vector<const ManagedParameter*>& items, Group group,
               Sharding sharding, at::ScalarType grad_dtype)
    : group_(std::move(group)), sharding_(sharding), elements_(layout.elements) {
  at::NoGradGuard no_grad;
  for (const auto& slot : layout.slots) entries_.push_back({items.at(slot.item), slot.offset});
  const auto& first = *entries_.front().parameter;
  const auto options = first.tensor.options().requires_grad(false);
  shard_elements_ = sharded() ? elements_ / group_.size() : elements_;
  begin_ = sharded() ? shard_elements_ * group_.rank() : 0;

  params_ = at::zeros({elements_}, options);
  for (const auto& entry : entries_) {
    auto tensor = entry.parameter->tensor;
    auto view = params_.narrow(0, entry.offset, tensor.numel()).view(tensor.sizes());
    view.copy_(tensor.detach());
    tensor.set_data(view);
  }
  param_shard_ = params_.narrow(0, begin_, shard_elements_);
  if (sharding_ == Sharding::kParameters) {
    param_shard_ = param_shard_.clone();
    release();
  }
  if (!first.trainable) return;
  grad_options_ = options.dtype(grad_dtype);
  if (shards_gradients()) {
    grad_shard_ = at::zeros({shard_elements_}, grad_options_);
  } else {
    grads_ = at::zeros({elements_}, grad_options_);
    grad_shard_ = grads_.narrow(0, begin_, shard_elements_);
    for (const auto& entry : entries_)
      main_.push_back(std::make_shared<MainGradient>(MainGradient{.grad = grad_view(entry)}));
  }
}

int64_t Bucket::grad_bytes() const {
  return !trainable() ? 0 : shards_gradients() ? grad_shard_.nbytes() : grads_.nbytes();
}

void Bucket::zero_gradients() {
  reduce_started_ = false;
  for (auto& main : main_) {
    main->fresh = true;
    main->added = false;
  }
  if (shards_gradients()) grad_shard_.zero_();
}

at::Tensor Bucket::grad_view(const Entry& entry) const {
  return grads_.narrow(0, entry.offset, entry.elements()).view(entry.parameter->tensor.sizes());
}

void Bucket::take(const Entry& entry) {
  at::NoGradGuard no_grad;
  auto& grad = entry.parameter->tensor.mutable_grad();
  if (!grad.defined()) return;  // its layer has added it already
  if (!grads_.defined()) grads_ = at::zeros({elements_}, grad_options_);
  if (main_.empty()) {
    grad_view(entry).add_(grad);
    grad.reset();
    return;
  }
  auto& main = *main_[&entry - entries_.data()];
  settle(main, std::exchange(grad, {}), !std::exchange(main.fresh, false));
}

bool Bucket::contributed(const Entry& entry) {
  const bool added = !main_.empty() && std::exchange(main_[&entry - entries_.data()]->added, false);
  return added || entry.parameter->tensor.grad().defined();
}

void Bucket::register_main_gradients(bool on) {
  for (size_t i = 0; i < main_.size(); ++i) {
    const auto& parameter = entries_[i].parameter->tensor;
    on ? set_main_gradient(parameter, main_[i]) : clear_main_gradient(parameter, main_[i]);
  }
}

void Bucket::start_reduce() {
  at::NoGradGuard no_grad;
  if (!shards_gradients()) {
    if (std::exchange(reduce_started_, true)) return;
    for (auto& main : main_)
      if (main->fresh) main->grad.zero_();  // nothing reached this parameter
    reducing_ = sharded() ? group_.start_reduce_scatter(grad_shard_, grads_) : group_.start_all_reduce(grads_);
    return;
  }
  if (!grads_.defined()) return;
  finish_reduce();
  if (group_.size() == 1) {
    reduced_ = grads_;
  } else {
    reduced_ = at::empty({shard_elements_}, grad_options_);
    reducing_ = group_.start_reduce_scatter(reduced_, grads_);
  }
  grads_.reset();  // the pending operation keeps it
}

void Bucket::finish_reduce() {
  at::NoGradGuard no_grad;
  if (reducing_) reducing_->wait();
  reducing_.reset();
  if (!reduced_.defined()) return;
  grad_shard_.add_(reduced_);
  reduced_.reset();
}

void Bucket::start_gather() {
  if (!sharded() || gathering_ || (sharding_ == Sharding::kParameters && in_place_)) return;
  at::NoGradGuard no_grad;
  if (sharding_ == Sharding::kParameters) {
    give_memory(params_);
    if (group_.size() == 1) params_.copy_(param_shard_);
  }
  in_place_ = true;
  gathering_ = group_.start_all_gather(movable(params_), movable(param_shard_));
}

void Bucket::finish_gather() {
  if (!gathering_) return;
  gathering_->wait();
  gathering_.reset();
}

void Bucket::release() {
  if (sharding_ != Sharding::kParameters || !in_place_) return;
  finish_gather();
  take_memory(params_);
  in_place_ = false;
}

void Bucket::take_over() {
  at::NoGradGuard no_grad;
  if (sharding_ == Sharding::kParameters && in_place_) param_shard_.copy_(params_.narrow(0, begin_, shard_elements_));
}

}  // namespace mcore_bridge
