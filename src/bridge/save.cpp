#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "bridge/atomic_folder.h"
#include "bridge/checkpoint_plan.h"
#include "bridge/shard_layout.h"
#include "bridge/shard_writer.h"
#include "bridge/tensor_encoder.h"
#include "core/thread_pool.h"
#include "mcore_bridge/error.h"
#include "models/gpt_model.h"
#include "parallel/together.h"

namespace mcore_bridge {
namespace {

constexpr int64_t kBlockBytes = 8 << 20;  // bounds the host copy of a block that has to leave a device

/// A part of a parameter and where it goes.
struct Block {
  const HfTensor* tensor;
  Box box;
  at::Tensor values;
};

/// Cuts a region of `value` into blocks of a few MiB.
void add_blocks(std::vector<Block>& blocks, const HfTensor& tensor, const Region& region, const at::Tensor& value,
                int64_t unit) {
  const auto row_bytes = std::max<int64_t>(1, region.cols * static_cast<int64_t>(value.element_size()));
  const auto height = std::max<int64_t>(1, kBlockBytes / row_bytes / unit) * unit;
  const auto matrix = as_matrix(value);
  const auto end = region.hf_row + region.rows;
  for (auto row = region.hf_row; row < end;) {
    const auto next = std::min(end, row / unit * unit + height);
    const Box box{row, region.hf_col, next - row, region.cols};
    if (box.numel() > 0) {
      blocks.push_back(
          {&tensor, box, mcore_bridge::box(matrix, region.row + row - region.hf_row, region.col, box.rows, box.cols)});
    }
    row = next;
  }
}

/// Encodes and writes what this rank owns. Values that have to be computed (merged adapters) are so a few at a time.
void write_parameters(const std::vector<PlannedParameter>& parameters, const TensorEncoder& encoder,
                      ShardWriter& writer) {
  constexpr int64_t kComputedBytes = 128 << 20;
  size_t next = 0;
  while (next < parameters.size()) {
    std::vector<Block> blocks;
    for (int64_t computed = 0; next < parameters.size() && computed < kComputedBytes; ++next) {
      const auto& parameter = parameters[next];
      at::Tensor value;
      for (const auto& region : parameter.plan.regions) {
        if (!region.owner) continue;
        if (!value.defined()) {
          value = parameter.value();
          if (!value.is_alias_of(parameter.tensor)) computed += static_cast<int64_t>(value.nbytes());
        }
        const auto& tensor = parameter.plan.tensors[region.tensor];
        add_blocks(blocks, tensor, region, value, encoder.row_block(tensor));
      }
    }
    run_parallel(blocks.size(), io_threads(), [&](size_t index, int) {
      const at::NoGradGuard no_grad;
      const auto& block = blocks[index];
      encoder.write(*block.tensor, block.box, block.values.to(at::kCPU).contiguous(), writer);
    });
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

  const auto encoder = plain_encoder(model.config().params_dtype);
  ShardLayout layout;
  std::vector<PlannedParameter> parameters;
  std::unique_ptr<AtomicFolder> target;
  step([&] {
    at::NoGradGuard no_grad;
    parameters = planned_parameters(chunks, selection);
    std::vector<StoredTensor> stored;
    for (const auto& tensor : whole_checkpoint(chunks, selection)) {
      for (auto& part : encoder->stored(tensor)) stored.push_back(std::move(part));
    }
    layout = shard_layout(stored, options.max_shard_bytes, options.peft_format ? "adapter_model" : "model");
    for (const auto& [name, content] : options.extra_files) {
      MCB_CHECK(!name.empty() && name.find('/') == std::string::npos && name[0] != '.', "save_weights: extra file '",
                name, "' is no plain file name");
    }
    target = std::make_unique<AtomicFolder>(folder);
  });
  const auto whole = in_place(chunks, selection);
  try {
    step([&] {
      if (!leader) return;
      target->begin();
      ShardWriter writer(target->staging(), layout);
      writer.create();
      writer.sync();
    });
    // Data-parallel replicas hold the same; one of them writes.
    if (parallel.dp_cp.rank() == 0) encoder->prepare(parameters, parallel.model);
    step([&] {
      if (parallel.dp_cp.rank() != 0) return;
      const at::NoGradGuard no_grad;
      ShardWriter writer(target->staging(), layout);
      write_parameters(parameters, *encoder, writer);
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
