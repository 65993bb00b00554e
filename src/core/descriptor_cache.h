// A bounded number of open files.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace mcore_bridge {

/// Closes its file when the last user lets go.
class Descriptor {
 public:
  explicit Descriptor(int file) : file_(file) {}
  ~Descriptor();
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return file_; }

 private:
  int file_;
};

/// Keeps the files used last open, so that a checkpoint of thousands of shards needs few descriptors. Thread-safe.
class DescriptorCache {
 public:
  explicit DescriptorCache(size_t most) : most_(most) {}
  /// The open file of `key`; `open` makes it when it is not (or no longer) there.
  std::shared_ptr<const Descriptor> get(uint64_t key, const std::function<int()>& open);
  void drop(uint64_t key);

 private:
  using Order = std::list<std::pair<uint64_t, std::shared_ptr<const Descriptor>>>;
  const size_t most_;
  std::mutex mutex_;
  Order order_;  // used last: front
  std::unordered_map<uint64_t, Order::iterator> places_;
};

}  // namespace mcore_bridge
