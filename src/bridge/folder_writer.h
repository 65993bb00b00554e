// A checkpoint folder written tensor by tensor without a model: names and shapes first, then values in any order.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bridge/atomic_folder.h"
#include "bridge/shard_writer.h"

namespace mcore_bridge {

/// The folder appears with commit(), whole, or stays as it was. Until then everything is in a sibling folder, which the
/// destructor removes. One process writes; several of its threads may.
class FolderWriter {
 public:
  /// Takes the disk space of all files at once: a full disk shows here.
  FolderWriter(const std::string& folder, const std::vector<StoredTensor>& tensors, int64_t max_shard_bytes);
  ~FolderWriter();

  ShardWriter& shards() { return *writer_; }
  int64_t files() const { return static_cast<int64_t>(layout_.files.size()); }
  /// Removes what was written; the old state stays.
  void abandon() noexcept { target_.abandon(); }
  /// `extra_files`: (plain file name, content), written beside the weights.
  void commit(const std::vector<std::pair<std::string, std::string>>& extra_files);

 private:
  ShardLayout layout_;
  AtomicFolder target_;
  std::unique_ptr<ShardWriter> writer_;
  bool committed_ = false;
};

}  // namespace mcore_bridge
