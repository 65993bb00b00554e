#include "core/input_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

constexpr uint64_t kReadAhead = 256 << 10;  // one piece of advice is cut to what the device takes at once

DescriptorCache& descriptors() {
  static DescriptorCache cache(64);
  return cache;
}

int open_for_reading(const std::string& path) {
  // Without O_NONBLOCK a FIFO put in a file's place would wait for a writer for ever.
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) {
    if (errno == ENOENT) fail<FileNotFoundError>(path, ": no such file");
    fail<IoError>(path, ": cannot be opened: ", std::strerror(errno));
  }
  ::posix_fadvise(file, 0, 0, POSIX_FADV_SEQUENTIAL);
  return file;
}

int64_t modified_ns(const struct stat& status) {
  return static_cast<int64_t>(status.st_mtim.tv_sec) * 1'000'000'000 + status.st_mtim.tv_nsec;
}

void read_all(int file, const std::string& path, uint64_t offset, char* to, uint64_t bytes) {
  constexpr uint64_t kMost = 1 << 30;  // one call moves less than 2^31 bytes
  while (bytes > 0) {
    const auto count = ::pread(file, to, std::min(bytes, kMost), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail<IoError>(path, ": cannot be read at byte ", offset, ": ", std::strerror(errno));
    if (count == 0) fail<IoError>(path, ": ends at byte ", offset, "; it has become shorter while it was read");
    to += count;
    offset += static_cast<uint64_t>(count);
    bytes -= static_cast<uint64_t>(count);
  }
}

}  // namespace

InputFile::InputFile(std::string path) : path_(std::move(path)) {
  static std::atomic<uint64_t> next_key = 0;
  key_ = next_key++;
  struct stat status {};
  descriptors().get(key_, [&] {
    const int file = open_for_reading(path_);
    const bool known = ::fstat(file, &status) == 0 && S_ISREG(status.st_mode);
    if (!known) ::close(file);
    MCB_CHECK(known, path_, ": is no regular file");
    return file;
  });
  size_ = static_cast<uint64_t>(status.st_size);
  device_ = status.st_dev;
  inode_ = status.st_ino;
  modified_ns_ = modified_ns(status);
}

InputFile::~InputFile() { descriptors().drop(key_); }

std::shared_ptr<const Descriptor> InputFile::open() const {
  return descriptors().get(key_, [&] {
    const int file = open_for_reading(path_);
    struct stat status {};
    if (::fstat(file, &status) != 0 || status.st_dev != device_ || status.st_ino != inode_ ||
        static_cast<uint64_t>(status.st_size) != size_ || modified_ns(status) != modified_ns_) {
      ::close(file);
      fail<IoError>(path_, ": was replaced or changed while it was being read");
    }
    return file;
  });
}

void InputFile::read(uint64_t offset, void* to, uint64_t bytes) const {
  if (bytes == 0) return;
  if (bytes > kReadAhead) will_need(offset, bytes);
  read_all(open()->get(), path_, offset, static_cast<char*>(to), bytes);
  bytes_read_ += bytes;
}

void InputFile::read_strided(uint64_t offset, uint64_t stride, uint64_t rows, uint64_t piece, void* to) const {
  if (rows == 0 || piece == 0) return;
  if (piece == stride) return read(offset, to, rows * piece);
  // Small pieces far apart defeat the kernel's own reading ahead; the ranks beside this one need what lies between.
  const bool dense = stride <= kReadAhead;
  if (dense) will_need(offset, (rows - 1) * stride + piece);
  const auto file = open();
  for (uint64_t row = 0; row < rows; ++row)
    read_all(file->get(), path_, offset + row * stride, static_cast<char*>(to) + row * piece, piece);
  bytes_read_ += rows * piece;
}

void InputFile::will_need(uint64_t offset, uint64_t bytes) const {
  const auto file = open();
  for (const auto end = offset + bytes; offset < end; offset += kReadAhead) {
    const auto some = std::min(kReadAhead, end - offset);
    ::posix_fadvise(file->get(), static_cast<off_t>(offset), static_cast<off_t>(some), POSIX_FADV_WILLNEED);
  }
}

}  // namespace mcore_bridge
