// A folder that appears whole or not at all.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>

namespace mcore_bridge {

/// New content is written to a sibling folder and exchanged with the target in one step (renameat2 RENAME_EXCHANGE), so
/// a crash at any moment leaves the old or the new state. Where the file system cannot exchange, the old folder is
/// first renamed to ".<name>.old" and put back by the next use if the crash fell between the two renames.
class AtomicFolder {
 public:
  /// `token`: a number that all processes writing this folder share and no others do (common_token), so that what is
  /// left of an earlier run cannot write into it; 0 when one process writes alone.
  explicit AtomicFolder(const std::string& target, int64_t token = 0);

  const std::filesystem::path& staging() const { return staging_; }
  /// Removes what killed runs left, then makes the empty staging folder. One process does this.
  void begin();
  /// Takes over every file of the old folder that `replaced` does not name, then exchanges. One process does this,
  /// after all writers are done and their files are synced.
  void commit(const std::function<bool(const std::string& file_name)>& replaced);
  /// Removes the staging folder; never throws.
  void abandon() noexcept;

 private:
  std::filesystem::path target_, staging_, old_;
};

/// Writes a whole small file and syncs it. IoError names the path and the cause.
void write_file(const std::filesystem::path& path, const std::string& content);
/// Syncs a file or folder to the disk.
void sync_path(const std::filesystem::path& path);

}  // namespace mcore_bridge
