#include <ATen/ATen.h>
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "bridge/atomic_folder.h"
#include "bridge/checkpoint_plan.h"
#include "bridge/shard_layout.h"
#include "mcore_bridge/error.h"
#include "models/gpt_model.h"
#include "parallel/together.h"

namespace mcore_bridge {
namespace {

/// Files of a layout, open for writing at any place; synced and closed at the end.
class ShardWriter {
 public:
  ShardWriter(std::filesystem::path folder, const ShardLayout& layout)
      : folder_(std::move(folder)), layout_(layout), files_(layout.files.size(), -1) {}
  ~ShardWriter() {
    for (const int file : files_) {
      if (file >= 0) ::close(file);
    }
  }
  ShardWriter(const ShardWriter&) = delete;
  ShardWriter& operator=(const ShardWriter&) = delete;

  /// Makes every file with its header and full length.
  void create() {
    for (const auto& file : layout_.files) {
      write_file(folder_ / file.name, file.header);
      if (::truncate((folder_ / file.name).c_str(), static_cast<off_t>(file.bytes)) != 0) error(file, errno);
    }
  }

  void write(int index, uint64_t offset, const void* data, size_t bytes) {
    const auto& shard = layout_.files[index];
    auto& file = files_[index];
    if (file < 0) file = ::open((folder_ / shard.name).c_str(), O_WRONLY | O_CLOEXEC);
    if (file < 0) error(shard, errno);
    const auto* from = static_cast<const char*>(data);
    while (bytes > 0) {
      const auto count = ::pwrite(file, from, bytes, static_cast<off_t>(offset));
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) error(shard, count < 0 ? errno : ENOSPC);
      from += count;
      offset += static_cast<uint64_t>(count);
      bytes -= static_cast<size_t>(count);
    }
  }

  void sync() {
    for (size_t i = 0; i < files_.size(); ++i) {
      if (files_[i] >= 0 && ::fsync(files_[i]) != 0) error(layout_.files[i], errno);
    }
  }

 private:
  [[noreturn]] void error(const ShardFile& file, int code) const {
    fail<IoError>((folder_ / file.name).string(), ": cannot be written: ", std::strerror(code));
  }
  std::filesystem::path folder_;
  const ShardLayout& layout_;
  std::vector<int> files_;
};

constexpr int64_t kBlockBytes = 64 << 20;  // bounds the host copy of a block that has to leave a device or be packed

void write_region(ShardWriter& writer, const ShardLayout::Place& place, const HfTensor& tensor, const Region& region,
                  const at::Tensor& parameter) {
  const auto element = static_cast<int64_t>(parameter.element_size());
  const auto matrix = as_matrix(parameter);
  const auto rows_per_block = std::max<int64_t>(1, kBlockBytes / (region.cols * element));
  for (int64_t row = 0; row < region.rows; row += rows_per_block) {
    const auto rows = std::min(rows_per_block, region.rows - row);
    const auto block = box(matrix, region.row + row, region.col, rows, region.cols).to(at::kCPU).contiguous();
    const auto* data = static_cast<const char*>(block.const_data_ptr());
    const auto start =
        place.offset + static_cast<uint64_t>(((region.hf_row + row) * tensor.cols + region.hf_col) * element);
    if (region.cols == tensor.cols) {
      writer.write(place.file, start, data, static_cast<size_t>(rows * region.cols * element));
      continue;
    }
    const auto piece = static_cast<size_t>(region.cols * element);
    for (int64_t i = 0; i < rows; ++i)
      writer.write(place.file, start + static_cast<uint64_t>(i * tensor.cols * element), data + i * piece, piece);
  }
}

/// Weight files that the new ones stand for.
bool is_replaced(const std::string& name, bool peft_format) {
  const bool weights = name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") ||
                       name.ends_with(".bin") || name.ends_with(".bin.index.json");
  if (peft_format) return weights && name.starts_with("adapter_model");
  return weights && (name.starts_with("model") || name.starts_with("pytorch_model"));
}

}  // namespace

void save_weights(const Chunks& chunks, const std::string& folder, const SaveOptions& options) {
  MCB_CHECK(!chunks.empty(), "save_weights: no model given");
  MCB_CHECK(!(options.peft_format && options.merge_lora),
            "save_weights: peft_format and merge_lora exclude each other");
  const auto& model = *chunks[0];
  const auto& parallel = model.parallel();
  const Selection selection{options.peft_format, options.adapter_name, options.merge_lora};
  const bool leader = parallel.rank == 0;
  auto step = [&](const std::function<void()>& work) { together(parallel.world, work); };

  ShardLayout layout;
  std::vector<PlannedParameter> parameters;
  std::unique_ptr<AtomicFolder> target;
  step([&] {
    at::NoGradGuard no_grad;
    parameters = planned_parameters(chunks, selection);
    layout = shard_layout(whole_checkpoint(chunks, selection), model.config().params_dtype, options.max_shard_bytes,
                          options.peft_format ? "adapter_model" : "model");
    for (const auto& [name, content] : options.extra_files) {
      MCB_CHECK(!name.empty() && name.find('/') == std::string::npos && name[0] != '.', "save_weights: extra file '",
                name, "' is no plain file name");
    }
    target = std::make_unique<AtomicFolder>(folder);
  });
  try {
    step([&] {
      if (!leader) return;
      target->begin();
      ShardWriter(target->staging(), layout).create();
    });
    step([&] {
      // Data-parallel replicas hold the same; one of them writes.
      if (parallel.dp_cp.rank() != 0) return;
      at::NoGradGuard no_grad;
      ShardWriter writer(target->staging(), layout);
      for (const auto& parameter : parameters) {
        at::Tensor value;
        for (const auto& region : parameter.plan.regions) {
          if (!region.owner) continue;
          if (!value.defined()) value = parameter.value();
          const auto& tensor = parameter.plan.tensors[region.tensor];
          write_region(writer, layout.places.at(tensor.name), tensor, region, value);
        }
      }
      writer.sync();
    });
    step([&] {
      if (!leader) return;
      for (const auto& [name, content] : options.extra_files) write_file(target->staging() / name, content);
      if (!layout.index.empty()) write_file(target->staging() / "model.safetensors.index.json", layout.index);
      target->commit([&](const std::string& name) { return is_replaced(name, options.peft_format); });
    });
  } catch (...) {
    if (leader) target->abandon();
    throw;
  }
}

}  // namespace mcore_bridge
