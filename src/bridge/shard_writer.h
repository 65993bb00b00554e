// The files of a layout, written at any place by any thread of any rank.
#pragma once

#include <filesystem>
#include <mutex>
#include <set>

#include "bridge/shard_layout.h"
#include "bridge/tensor_source.h"
#include "core/descriptor_cache.h"

namespace mcore_bridge {

/// At most 64 files are open at a time. Errors are IoErrors that name the file and the cause (a full disk first of
/// all). Thread-safe; the layout must outlive it.
class ShardWriter {
 public:
  ShardWriter(std::filesystem::path folder, const ShardLayout& layout);

  /// Makes every file with its header, and takes the disk space of all its bytes, so that a full disk shows before
  /// anything else is done. One process does this, before any other writes.
  void create();
  /// Bytes of a file, from `offset` of its start.
  void write(int file, uint64_t offset, const void* data, uint64_t bytes);
  /// A box of the stored tensor `name`, seen as a matrix of `cols` columns; `data`: its rows without gaps.
  void write_box(const std::string& name, int64_t cols, const Box& box, const void* data, uint64_t element_bytes);
  /// Waits until everything this object wrote is on the disk.
  void sync();

 private:
  std::shared_ptr<const Descriptor> open(int file);
  [[noreturn]] void error(int file, int code) const;
  const std::filesystem::path folder_;
  const ShardLayout& layout_;
  DescriptorCache descriptors_{64};
  std::mutex mutex_;
  std::set<int> written_;
};

}  // namespace mcore_bridge
