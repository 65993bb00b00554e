#include "core/descriptor_cache.h"

#include <unistd.h>

namespace mcore_bridge {

Descriptor::~Descriptor() {
  if (file_ >= 0) ::close(file_);
}

std::shared_ptr<const Descriptor> DescriptorCache::get(uint64_t key, const std::function<int()>& open) {
  const std::scoped_lock lock(mutex_);
  if (const auto found = places_.find(key); found != places_.end()) {
    order_.splice(order_.begin(), order_, found->second);
    return found->second->second;
  }
  auto descriptor = std::make_shared<const Descriptor>(open());
  order_.emplace_front(key, descriptor);
  places_[key] = order_.begin();
  if (order_.size() > most_) {
    places_.erase(order_.back().first);
    order_.pop_back();
  }
  return descriptor;
}

void DescriptorCache::drop(uint64_t key) {
  const std::scoped_lock lock(mutex_);
  if (const auto found = places_.find(key); found != places_.end()) {
    order_.erase(found->second);
    places_.erase(found);
  }
}

}  // namespace mcore_bridge
