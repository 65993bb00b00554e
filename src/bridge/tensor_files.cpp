#include "bridge/tensor_files.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <mutex>

#include "bridge/region_blocks.h"
#include "bridge/shard_writer.h"
#include "core/crc32c.h"
#include "core/thread_pool.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

constexpr int64_t kAlignment = 64;  // of copies in host memory

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

TensorFiles::TensorFiles(std::string subfolder, std::string stem, const std::vector<StoredTensor>& tensors,
                         int64_t max_shard_bytes)
    : subfolder_(std::move(subfolder)), stem_(std::move(stem)) {
  if (tensors.empty()) return;
  layout_ = shard_layout(tensors, max_shard_bytes, stem_);
  for (const auto& tensor : tensors) dtypes_[tensor.name] = tensor.dtype;
}

void TensorFiles::add(const std::string& tensor, int64_t cols, const Box& box, const at::Tensor& values) {
  pieces_.push_back({tensor, cols, box, values, dtypes_.at(tensor)});
}

int64_t TensorFiles::bytes() const {
  int64_t total = 0;
  for (const auto& piece : pieces_) total += aligned(piece.bytes());
  return total;
}

void TensorFiles::copy_to(const at::Tensor& memory) {
  const at::NoGradGuard no_grad;
  copies_.clear();
  std::vector<size_t> on_host;
  int64_t at = 0;
  for (size_t i = 0; i < pieces_.size(); ++i) {
    const auto& piece = pieces_[i];
    copies_.push_back(memory.narrow(0, at, piece.bytes()).view(piece.dtype).view(piece.values.sizes()));
    at += aligned(piece.bytes());
    if (piece.values.is_cpu()) {
      on_host.push_back(i);
    } else {
      // Packed and converted on the device: a strided copy between memories would wait.
      copies_.back().copy_(piece.values.to(piece.dtype).contiguous(), /*non_blocking=*/true);
    }
  }
  run_parallel(on_host.size(), io_threads(), [&](size_t index, int) {
    const at::NoGradGuard worker_no_grad;
    const auto& values = pieces_[on_host[index]].values;
    if (values.dim() == 2) {
      copy_on_this_thread(copies_[on_host[index]], values);
    } else {
      copies_[on_host[index]].copy_(values);
    }
  });
}

void TensorFiles::create(const std::filesystem::path& folder) const {
  if (empty()) return;
  ShardWriter writer(folder / subfolder_, layout_);
  writer.create();
  writer.sync();
}

std::vector<uint32_t> TensorFiles::write(const std::filesystem::path& folder) const {
  std::vector<Crc32cPart> parts;
  for (const auto& file : layout_.files) parts.emplace_back(file.bytes);
  if (!pieces_.empty()) {
    ShardWriter writer(folder / subfolder_, layout_);
    std::mutex mutex;
    run_parallel(pieces_.size(), io_threads(), [&](size_t index, int) {
      const at::NoGradGuard no_grad;
      const auto& piece = pieces_[index];
      const auto values = copies_.empty() ? piece.values.to(piece.dtype).to(at::kCPU).contiguous() : copies_[index];
      const auto element = c10::elementSize(piece.dtype);
      writer.write_box(piece.tensor, piece.cols, piece.box, values.const_data_ptr(), element);
      const auto& place = layout_.places.at(piece.tensor);
      Crc32cPart part(layout_.files[place.file].bytes);
      const auto start = place.offset + static_cast<uint64_t>(piece.box.row * piece.cols + piece.box.col) * element;
      const auto row = static_cast<uint64_t>(piece.box.cols) * element;
      const auto stride = static_cast<uint64_t>(piece.cols) * element, rows = static_cast<uint64_t>(piece.box.rows);
      if (row == stride) {
        part.add(start, values.const_data_ptr(), row * rows);
      } else {
        part.add_rows(start, stride, rows, row, values.const_data_ptr());
      }
      const std::scoped_lock lock(mutex);
      parts[place.file].combine(part.part());
    });
    writer.sync();
  }
  std::vector<uint32_t> result;
  for (const auto& part : parts) result.push_back(part.part());
  return result;
}

std::vector<TensorFiles::File> TensorFiles::files() const {
  const auto prefix = subfolder_.empty() ? "" : subfolder_ + "/";
  std::vector<File> result;
  for (const auto& file : layout_.files) {
    Crc32cPart header(file.bytes);
    header.add(0, file.header.data(), file.header.size());
    result.push_back({prefix + file.name, file.bytes, header.part()});
  }
  return result;
}

std::pair<std::string, std::string> TensorFiles::index() const {
  const auto prefix = subfolder_.empty() ? "" : subfolder_ + "/";
  return {prefix + stem_ + ".safetensors.index.json", layout_.index};
}

}  // namespace mcore_bridge
