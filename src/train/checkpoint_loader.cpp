#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <filesystem>
#include <set>

#include "bridge/block_loader.h"
#include "bridge/checkpoint_reader.h"
#include "bridge/tensor_source.h"
#include "core/crc32c.h"
#include "core/input_file.h"
#include "core/thread_pool.h"
#include "mcore_bridge/error.h"
#include "mcore_bridge/training_checkpoint.h"
#include "models/gpt_model.h"
#include "parallel/together.h"
#include "train/state_plan.h"

namespace mcore_bridge {
namespace {

namespace fs = std::filesystem;

/// A part of a slice and where it comes from.
struct Block {
  std::shared_ptr<const TensorSource> source;
  Box box;
  at::Tensor target;
  TensorSource::Position position;
};

/// The files of each kind of state.
class StateReader {
 public:
  StateReader(std::string folder, bool peft_format) : folder_(std::move(folder)), peft_format_(peft_format) {}

  /// What holds `kind`. Masters that were not written are the weights: they were fp32.
  const CheckpointReader& reader(const std::string& kind) {
    auto& reader = readers_[kind];
    if (reader) return *reader;
    const auto state = (fs::path(folder_) / "training_state").string();
    for (const auto& [asked, other] : {std::pair{"master", "remainder"}, std::pair{"remainder", "master"}}) {
      const bool remainder = asked == std::string("remainder");
      MCB_CHECK(kind != asked || CheckpointReader::exists(state, {asked}) || !CheckpointReader::exists(state, {other}),
                "resume: ", folder_, " was written ", remainder ? "without" : "with",
                " store_param_remainders; resume with store_param_remainders ", remainder ? "false" : "true");
    }
    if (kind == "master" && !CheckpointReader::exists(state, {kind})) {
      reader = std::make_unique<CheckpointReader>(folder_, peft_format_);
    } else {
      reader = std::make_unique<CheckpointReader>(state, CheckpointReader::Stem{kind});
    }
    return *reader;
  }

 private:
  std::string folder_;
  bool peft_format_;
  std::map<std::string, std::unique_ptr<CheckpointReader>> readers_;
};

/// Numbers may have been kept in another precision; remainders are bits.
OpenedTensor open_state(const CheckpointReader& reader, const HfTensor& tensor, c10::ScalarType dtype) {
  if (dtype != at::kShort) return open_tensor(reader, tensor, Quantization{});
  const auto* found = reader.find(tensor.name);
  if (!found) return {};
  OpenedTensor result{.used = {tensor.name}};
  const bool fits = found->entry->dtype == dtype && found->entry->shape == tensor.sizes();
  if (fits)
    result.source = plain_source(*found, stored_columns(tensor));
  else
    result.wrong = "is " + found->entry->dtype_name + " or of another shape, where the optimizer needs I16";
  return result;
}

void load(Trainer& trainer, const std::string& folder, const CheckpointOptions& options) {
  const Selection selection{.peft_format = options.peft_format, .adapter_name = options.adapter_name};
  const auto parameters = planned_parameters(trainer.chunks(), selection);
  const auto slices = plan_slices(trainer.chunks(), parameters, trainer.optimizer().state());
  StateReader files(folder, options.peft_format);
  const at::NoGradGuard no_grad;
  std::vector<Block> blocks;
  std::set<std::string> missing, wrong;
  for (const auto& planned : slices) {
    const auto& reader = files.reader(planned.slice.kind);
    auto values = planned.slice.values;
    if (planned.parameter->plan.rule.pad_rows) values.zero_();
    for (const auto& region : planned.regions) {
      const auto& tensor = planned.tensor(region);
      const auto opened = open_state(reader, tensor, values.scalar_type());
      if (!opened.source) {
        (opened.used.empty() ? missing : wrong)
            .insert(planned.slice.kind + " of " + tensor.name + (opened.used.empty() ? "" : " " + opened.wrong));
        continue;
      }
      const auto stored = stored_box(tensor, region);
      const Box box{stored.row, stored.col, stored.rows, stored.cols};
      blocks.push_back({opened.source, box, stored_view(values, planned.slice.begin, planned.parameter->plan, region),
                        opened.source->position(box)});
    }
  }
  auto list = [](const std::set<std::string>& names) {
    std::string text;
    size_t count = 0;
    for (const auto& name : names) {
      if (++count <= 20) text += "\n  " + name;
    }
    return count > 20 ? text + "\n  ... and " + std::to_string(count - 20) + " more" : text;
  };
  MCB_CHECK(wrong.empty(), "resume: ", folder, ": ", wrong.size(), " tensors do not fit:", list(wrong));
  if (!missing.empty())
    fail<KeyError>("resume: ", folder, ": ", missing.size(), " tensors of the optimizer are missing:", list(missing),
                   "\nno_load_optim starts with a fresh optimizer");

  std::sort(blocks.begin(), blocks.end(), [](const auto& a, const auto& b) { return a.position < b.position; });
  const int threads = io_threads();
  std::vector<BlockLoader> loaders(static_cast<size_t>(threads));
  run_parallel(blocks.size(), threads, [&](size_t index, int thread) {
    const at::NoGradGuard worker_no_grad;
    const auto& block = blocks[index];
    auto& loader = loaders[static_cast<size_t>(thread)];
    if (block.target.dim() == 2) {
      loader.load(*block.source, block.box, block.target);
    } else {  // interleaved
      const auto matrix = at::empty({block.box.rows, block.box.cols}, block.target.options());
      loader.load(*block.source, block.box, matrix);
      block.target.copy_(matrix.view(block.target.sizes()));
    }
  });
  for (auto& loader : loaders) loader.finish();
}

}  // namespace

void load_optimizer_state(Trainer& trainer, const std::string& folder, const CheckpointOptions& options) {
  together(trainer.chunks().at(0)->parallel().world, [&] { load(trainer, folder, options); });
  trainer.optimizer().state_loaded();
}

std::vector<std::string> damaged_files(const std::string& folder, const std::vector<FileRecord>& files,
                                       const Group& group) {
  constexpr uint64_t kBlock = 16 << 20;
  const auto count = static_cast<int64_t>(files.size());
  // Per file: this rank's part of the CRC; and what it found when it opened it (0: fine, 1: missing, else 2 + size).
  auto own = at::zeros({2, std::max<int64_t>(1, count)}, at::kLong);
  auto* parts = own.mutable_data_ptr<int64_t>();
  auto* found = parts + own.size(1);
  struct Task {
    size_t file;
    uint64_t offset;
  };
  std::vector<Task> tasks;
  std::vector<std::unique_ptr<InputFile>> inputs(files.size());
  uint64_t turn = 0;
  for (size_t i = 0; i < files.size(); ++i) {
    try {
      inputs[i] = std::make_unique<InputFile>((fs::path(folder) / files[i].name).string());
      if (inputs[i]->size() != static_cast<uint64_t>(files[i].bytes))
        found[i] = 2 + static_cast<int64_t>(inputs[i]->size());
    } catch (const Error&) {
      found[i] = 1;
    }
    for (uint64_t at = 0; at < static_cast<uint64_t>(files[i].bytes); at += kBlock) {
      const bool mine = turn++ % static_cast<uint64_t>(group.size()) == static_cast<uint64_t>(group.rank());
      if (mine && found[i] == 0) tasks.push_back({i, at});
    }
  }
  std::mutex mutex;
  together(group, [&] {
    run_parallel(tasks.size(), io_threads(), [&](size_t index, int) {
      const auto [file, offset] = tasks[index];
      const auto size = static_cast<uint64_t>(files[file].bytes);
      std::vector<char> bytes(std::min(kBlock, size - offset));
      inputs[file]->read(offset, bytes.data(), bytes.size());
      Crc32cPart part(size);
      part.add(offset, bytes.data(), bytes.size());
      const std::scoped_lock lock(mutex);
      parts[file] ^= part.part();
    });
  });
  const auto all = group.all_gather(own).view({group.size(), 2, own.size(1)});
  std::vector<std::string> damaged;
  for (size_t i = 0; i < files.size(); ++i) {
    Crc32cPart crc(static_cast<uint64_t>(files[i].bytes));
    int64_t state = 0;
    for (int rank = 0; rank < group.size(); ++rank) {
      crc.combine(static_cast<uint32_t>(all[rank][0][static_cast<int64_t>(i)].item<int64_t>()));
      state = std::max(state, all[rank][1][static_cast<int64_t>(i)].item<int64_t>());
    }
    if (state == 1) {
      damaged.push_back(files[i].name + " is missing");
    } else if (state > 1) {
      damaged.push_back(files[i].name + " has " + std::to_string(state - 2) + " bytes instead of " +
                        std::to_string(files[i].bytes));
    } else if (crc.value() != static_cast<uint32_t>(files[i].crc32c)) {
      damaged.push_back(files[i].name + " does not match its checksum");
    }
  }
  return damaged;
}

}  // namespace mcore_bridge
