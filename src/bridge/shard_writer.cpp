#include "bridge/shard_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/thread_pool.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

/// Writes all of it; the error number, or 0.
int write_all(int file, const char* from, uint64_t bytes, uint64_t offset) {
  constexpr uint64_t kMost = 1 << 30;  // one call moves less than 2^31 bytes
  while (bytes > 0) {
    const auto count = ::pwrite(file, from, std::min(bytes, kMost), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return count < 0 ? errno : ENOSPC;
    from += count;
    offset += static_cast<uint64_t>(count);
    bytes -= static_cast<uint64_t>(count);
  }
  return 0;
}

/// Takes the space of a whole file; file systems that cannot promise space only get its length.
int reserve(int file, uint64_t bytes) {
  int code = EINTR;
  while (code == EINTR) code = ::fallocate(file, 0, 0, static_cast<off_t>(bytes)) == 0 ? 0 : errno;
  if (code == EOPNOTSUPP || code == ENOSYS) code = ::ftruncate(file, static_cast<off_t>(bytes)) == 0 ? 0 : errno;
  return code;
}

}  // namespace

ShardWriter::ShardWriter(std::filesystem::path folder, const ShardLayout& layout)
    : folder_(std::move(folder)), layout_(layout) {}

void ShardWriter::create() {
  for (size_t i = 0; i < layout_.files.size(); ++i) {
    const auto& shard = layout_.files[i];
    const Descriptor file(::open((folder_ / shard.name).c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
    int code = file.get() < 0 ? errno : 0;
    if (code == 0) code = reserve(file.get(), shard.bytes);
    if (code == 0) code = write_all(file.get(), shard.header.data(), shard.header.size(), 0);
    if (code) error(static_cast<int>(i), code);
    const std::scoped_lock lock(mutex_);
    written_.insert(static_cast<int>(i));
  }
}

std::shared_ptr<const Descriptor> ShardWriter::open(int index) {
  return descriptors_.get(static_cast<uint64_t>(index), [&] {
    const int file = ::open((folder_ / layout_.files[index].name).c_str(), O_WRONLY | O_CLOEXEC);
    if (file < 0) error(index, errno);
    const std::scoped_lock lock(mutex_);
    written_.insert(index);
    return file;
  });
}

void ShardWriter::write(int file, uint64_t offset, const void* data, uint64_t bytes) {
  if (bytes == 0) return;
  if (const int code = write_all(open(file)->get(), static_cast<const char*>(data), bytes, offset)) error(file, code);
}

void ShardWriter::write_box(const std::string& name, int64_t cols, const Box& box, const void* data,
                            uint64_t element_bytes) {
  if (box.numel() == 0) return;
  const auto& place = layout_.places.at(name);
  const auto* from = static_cast<const char*>(data);
  const auto start = place.offset + static_cast<uint64_t>(box.row * cols + box.col) * element_bytes;
  const auto piece = static_cast<uint64_t>(box.cols) * element_bytes,
             stride = static_cast<uint64_t>(cols) * element_bytes;
  const auto rows = static_cast<uint64_t>(box.rows);
  if (start + (rows - 1) * stride + piece > place.offset + place.bytes)
    throw std::logic_error("write_box: outside of tensor " + name);
  if (piece == stride) return write(place.file, start, data, rows * piece);
  const auto file = open(place.file);
  for (uint64_t row = 0; row < rows; ++row) {
    if (const int code = write_all(file->get(), from + row * piece, piece, start + row * stride))
      error(place.file, code);
  }
}

void ShardWriter::sync() {
  const std::vector<int> files(written_.begin(), written_.end());
  run_parallel(files.size(), io_threads(), [&](size_t i, int) {
    if (::fsync(open(files[i])->get()) != 0) error(files[i], errno);
  });
}

void ShardWriter::error(int file, int code) const {
  fail<IoError>((folder_ / layout_.files[file].name).string(), ": cannot be written: ", std::strerror(code));
}

}  // namespace mcore_bridge
