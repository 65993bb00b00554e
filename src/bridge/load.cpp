#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <set>

#include "bridge/block_loader.h"
#include "bridge/checkpoint_plan.h"
#include "bridge/checkpoint_reader.h"
#include "bridge/tensor_source.h"
#include "core/thread_pool.h"
#include "mcore_bridge/error.h"
#include "models/gpt_model.h"
#include "parallel/together.h"

namespace mcore_bridge {
namespace {

std::string joined(const std::vector<std::string>& lines) {
  constexpr size_t kMost = 20;
  std::string text;
  for (size_t i = 0; i < std::min(lines.size(), kMost); ++i) text += "\n  " + lines[i];
  if (lines.size() > kMost) text += "\n  ... and " + std::to_string(lines.size() - kMost) + " more";
  return text;
}

/// What Transformers writes or ignores itself: nothing to tell the user.
bool ignorable(const std::string& name, bool tied) {
  return name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight");
}

/// A part of a parameter and where it comes from.
struct Block {
  const TensorSource* source;
  Box box;
  at::Tensor target;
  TensorSource::Position position;
};

/// Cuts a region into blocks of a few MiB.
void add_blocks(std::vector<Block>& blocks, const TensorSource& source, const Region& region,
                const at::Tensor& parameter) {
  const auto row_bytes = region.cols * static_cast<int64_t>(c10::elementSize(source.dtype()));
  const auto unit = source.row_block();
  const auto height = std::max<int64_t>(1, BlockLoader::kBlockBytes / std::max<int64_t>(1, row_bytes) / unit) * unit;
  const auto end = region.hf_row + region.rows;
  for (auto row = region.hf_row; row < end;) {
    const auto next = std::min(end, row / unit * unit + height);
    const Box box{row, region.hf_col, next - row, region.cols};
    if (box.numel() > 0) {
      blocks.push_back({&source, box,
                        mcore_bridge::box(parameter, region.row + row - region.hf_row, region.col, box.rows, box.cols),
                        source.position(box)});
    }
    row = next;
  }
}

using Sources = std::map<std::string, std::shared_ptr<const TensorSource>>;

/// Finds every tensor of the whole checkpoint, so that every rank finds the same, and checks all before anything is
/// copied.
Sources open_sources(const CheckpointReader& reader, const Chunks& chunks, const Selection& selection,
                     const std::string& folder, bool strict, LoadReport& report) {
  const bool tied = !chunks[0]->config().untie_embeddings_and_output_weights;
  std::vector<std::string> wrong;
  std::set<std::string> used;
  Sources sources;
  for (const auto& tensor : whole_checkpoint(chunks, selection)) {
    auto opened = open_tensor(reader, tensor);
    used.insert(opened.used.begin(), opened.used.end());
    if (opened.source) {
      sources[tensor.name] = std::move(opened.source);
    } else if (opened.used.empty()) {
      report.missing.push_back(tensor.name);
    } else {
      wrong.push_back(tensor.name + " " + opened.wrong);
    }
  }
  for (const auto& [name, tensor] : reader.tensors()) {
    if (!used.contains(name) && !ignorable(name, tied)) report.unexpected.push_back(name);
  }
  MCB_CHECK(wrong.empty(), "load_weights: ", folder, ": ", wrong.size(), " tensors do not fit:", joined(wrong));
  if (strict && !report.missing.empty()) {
    const bool head = report.missing.size() == 1 && report.missing[0] == "lm_head.weight";
    fail<KeyError>(
        "load_weights: ", folder, ": ", report.missing.size(), " tensors are missing:", joined(report.missing),
        head ? "\n(tie_word_embeddings is false in config.json, so the output layer needs its own matrix)" : "");
  }
  return sources;
}

LoadReport load(const Chunks& chunks, const std::string& folder, const LoadOptions& options) {
  const Selection selection{.peft_format = options.peft_format, .adapter_name = options.adapter_name};
  const CheckpointReader reader(folder, options.peft_format);
  const auto parameters = planned_parameters(chunks, selection);
  LoadReport report;
  const auto sources = open_sources(reader, chunks, selection, folder, options.strict, report);

  at::NoGradGuard no_grad;
  std::vector<Block> blocks;
  for (const auto& parameter : parameters) {
    auto target = as_matrix(parameter.tensor.detach());
    int64_t covered = 0;
    for (const auto& region : parameter.plan.regions) {
      const auto found = sources.find(parameter.plan.tensors[region.tensor].name);
      if (found == sources.end()) continue;
      const auto before = blocks.size();
      add_blocks(blocks, *found->second, region, target);
      for (auto i = before; i < blocks.size(); ++i)
        report.bytes_needed += static_cast<int64_t>(found->second->file_bytes(blocks[i].box));
      covered += region.rows * region.cols;
    }
    if (parameter.plan.rule.pad_rows && covered > 0 && covered < target.numel()) target.zero_();
  }
  std::sort(blocks.begin(), blocks.end(), [](const auto& a, const auto& b) { return a.position < b.position; });

  const int threads = io_threads();
  std::vector<BlockLoader> loaders(static_cast<size_t>(threads));
  run_parallel(blocks.size(), threads, [&](size_t index, int thread) {
    const at::NoGradGuard worker_no_grad;
    const auto& block = blocks[index];
    loaders[thread].load(*block.source, block.box, block.target);
  });
  for (auto& loader : loaders) loader.finish();
  for (const auto& file : reader.files()) report.bytes_read += static_cast<int64_t>(file->data_bytes_read());
  TORCH_INTERNAL_ASSERT(report.bytes_read == report.bytes_needed, "load_weights read ", report.bytes_read,
                        " bytes for slices of ", report.bytes_needed);
  return report;
}

}  // namespace

LoadReport load_weights(const Chunks& chunks, const std::string& folder, const LoadOptions& options) {
  MCB_CHECK(!chunks.empty(), "load_weights: no model given");
  LoadReport report;
  const auto whole = in_place(chunks, {options.peft_format, options.adapter_name});
  together(chunks[0]->parallel().world, [&] { report = load(chunks, folder, options); });
  return report;
}

}  // namespace mcore_bridge
