#include "bridge/atomic_folder.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace fs = std::filesystem;
namespace {

const std::string kStaging = ".saving";

[[noreturn]] void io_error(const fs::path& path, const char* what, int code) {
  fail<IoError>(path.string(), ": ", what, ": ", std::strerror(code));
}

void check(const std::error_code& error, const fs::path& path, const char* what) {
  if (error) fail<IoError>(path.string(), ": ", what, ": ", error.message());
}

fs::path sibling(const fs::path& target, const std::string& suffix) {
  return target.parent_path() / ("." + target.filename().string() + suffix);
}

/// The folder itself when the path is a link, without a trailing slash.
fs::path resolved(const std::string& target) {
  MCB_CHECK(!target.empty(), "output folder: the path is empty");
  std::error_code error;
  auto path = fs::absolute(target).lexically_normal();
  if (path.filename().empty()) path = path.parent_path();
  if (const auto real = fs::canonical(path, error); !error) path = real;
  MCB_CHECK(path.has_filename() && path != path.root_path(), "output folder: ", target, " cannot be replaced");
  return path;
}

}  // namespace

AtomicFolder::AtomicFolder(const std::string& target, int64_t token)
    : target_(resolved(target)),
      staging_(sibling(target_, kStaging + (token ? "-" + std::to_string(token) : ""))),
      old_(sibling(target_, ".old")) {}

void AtomicFolder::begin() {
  std::error_code error;
  if (fs::exists(old_, error) && !fs::exists(target_, error)) {
    fs::rename(old_, target_, error);
    check(error, old_, "cannot be put back");
  }
  if (fs::exists(target_, error) && !fs::is_directory(target_, error))
    fail<IoError>(target_.string(), ": is no folder");
  std::vector<fs::path> leftovers{old_};
  const auto staging = sibling(target_, kStaging).filename().string();
  for (fs::directory_iterator entry(target_.parent_path(), error), end; !error && entry != end;
       entry.increment(error)) {
    const auto name = entry->path().filename().string();
    if (name == staging || name.starts_with(staging + "-")) leftovers.push_back(entry->path());
  }
  error.clear();  // no folder there yet: it is made below
  for (const auto& leftover : leftovers) {
    fs::remove_all(leftover, error);
    check(error, leftover, "a leftover cannot be removed");
  }
  fs::create_directories(staging_, error);
  check(error, staging_, "cannot be made");
}

void AtomicFolder::commit(const std::function<bool(const std::string&)>& replaced) {
  std::error_code error;
  const bool exists = fs::exists(target_, error);
  if (exists) {
    for (const auto& entry : fs::directory_iterator(target_)) {
      const auto name = entry.path().filename();
      if (replaced(name.string()) || fs::exists(staging_ / name)) continue;
      if (entry.is_directory() && !entry.is_symlink()) {
        fs::copy(entry.path(), staging_ / name,
                 fs::copy_options::recursive | fs::copy_options::copy_symlinks | fs::copy_options::create_hard_links,
                 error);
      } else {
        fs::create_hard_link(entry.path(), staging_ / name, error);
      }
      if (error) {
        error.clear();
        fs::copy(entry.path(), staging_ / name,
                 fs::copy_options::recursive | fs::copy_options::copy_symlinks | fs::copy_options::overwrite_existing,
                 error);
      }
      check(error, entry.path(), "cannot be kept");
    }
  }
  sync_path(staging_);
  if (!exists) {
    fs::rename(staging_, target_, error);
    check(error, target_, "cannot be made");
  } else if (::syscall(SYS_renameat2, AT_FDCWD, staging_.c_str(), AT_FDCWD, target_.c_str(), RENAME_EXCHANGE) == 0) {
    sync_path(target_.parent_path());
    fs::remove_all(staging_, error);  // the old state now; if this fails the next save removes it
  } else if (errno == EINVAL || errno == ENOSYS || errno == ENOTSUP) {
    fs::rename(target_, old_, error);
    check(error, target_, "cannot be set aside");
    fs::rename(staging_, target_, error);
    check(error, target_, "cannot be replaced");
    fs::remove_all(old_, error);
  } else {
    io_error(target_, "cannot be replaced", errno);
  }
  sync_path(target_.parent_path());
}

void AtomicFolder::abandon() noexcept {
  std::error_code error;
  fs::remove_all(staging_, error);
}

void write_file(const fs::path& path, const std::string& content) {
  const int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (file < 0) io_error(path, "cannot be made", errno);
  size_t done = 0;
  int code = 0;
  while (done < content.size() && code == 0) {
    const auto count = ::write(file, content.data() + done, content.size() - done);
    if (count < 0 && errno != EINTR) code = errno;
    if (count > 0) done += static_cast<size_t>(count);
  }
  if (code == 0 && ::fsync(file) != 0) code = errno;
  ::close(file);
  if (code) io_error(path, "cannot be written", code);
}

void sync_path(const fs::path& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) io_error(path, "cannot be synced", errno);
  const int code = ::fsync(file) == 0 ? 0 : errno;
  ::close(file);
  if (code && code != EINVAL)
    io_error(path, "cannot be synced", code);  // EINVAL: this file system does not sync folders
}

}  // namespace mcore_bridge
