#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <atomic>
#include <exception>

#include "bridge/atomic_folder.h"
#include "bridge/checkpoint_plan.h"
#include "bridge/formats/fp8_encoder.h"
#include "bridge/region_blocks.h"
#include "bridge/shard_layout.h"
#include "bridge/shard_writer.h"
#include "bridge/tensor_encoder.h"
#include "core/thread_pool.h"
#include "mcore_bridge/error.h"
#include "models/gathered_masters.h"
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

/// Encodes and writes what this rank owns. Values that have to be computed (merged adapters) are so a few at a time.
void write_parameters(const std::vector<PlannedParameter>& parameters, const TensorEncoder& encoder,
                      ShardWriter& writer, const Progress& progress) {
  constexpr int64_t kComputedBytes = 128 << 20;
  int64_t total = 0;
  for (const auto& parameter : parameters) {
    for (const auto& region : parameter.plan.regions)
      if (region.owner) total += region.rows * region.cols * static_cast<int64_t>(c10::elementSize(parameter.dtype));
  }
  std::atomic<int64_t> done = 0;
  for (size_t next = 0; next < parameters.size();) {
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
        const auto elements = kBlockBytes / static_cast<int64_t>(value.element_size());
        for (auto& [box, view] : region_blocks(tensor, region, value, elements, encoder.row_block(tensor)))
          blocks.push_back({&tensor, box, std::move(view)});
      }
    }
    auto write_block = [&](size_t index, int) {
      const at::NoGradGuard no_grad;
      auto& block = blocks[index];
      auto values = block.values.device().is_cpu() ? block.values : block.values.contiguous().to(at::kCPU);
      if (!values.is_contiguous()) {
        auto packed = at::empty(values.sizes(), values.options());
        copy_on_this_thread(packed, values);
        values = packed;
      }
      encoder.write(*block.tensor, block.box, values, writer);
      done += static_cast<int64_t>(values.nbytes());
      block.values = at::Tensor();
    };
    run_parallel(blocks.size(), io_threads(), write_block, [&] {
      if (progress) progress(done, total);
    });
  }
}

/// A converter around the plain encoder: tensors under other names, left out, or (not written here) changed.
class ConvertingEncoder : public TensorEncoder {
 public:
  using Convert = decltype(SaveOptions::convert);
  ConvertingEncoder(std::unique_ptr<TensorEncoder> plain, const Convert& convert)
      : plain_(std::move(plain)), convert_(convert) {}

  std::vector<StoredTensor> stored(const HfTensor& tensor) const override {
    auto parts = plain_->stored(tensor);
    auto saved = convert_(tensor.name, parts.at(0).shape, parts.at(0).dtype);
    if (saved) {
      parts[0].name = saved->name;
      if (saved->value) parts[0] = {saved->name, saved->shape, saved->dtype};
    } else {
      parts.clear();
    }
    saved_[tensor.name] = std::move(saved);
    return parts;
  }
  void write(const HfTensor& tensor, const Box& box, const at::Tensor& values, ShardWriter& writer) const override {
    const auto& saved = saved_.at(tensor.name);
    if (!saved || saved->value) return;
    auto renamed = tensor;
    renamed.name = saved->name;
    plain_->write(renamed, box, values, writer);
  }

  std::set<std::string> changed() const {
    std::set<std::string> names;
    for (const auto& [name, saved] : saved_)
      if (saved && saved->value) names.insert(name);
    return names;
  }
  /// Lets a whole tensor through the converter and writes it.
  void write_changed(const std::string& name, const at::Tensor& tensor, ShardWriter& writer) const {
    const auto& saved = *saved_.at(name);
    const auto value = saved.value(tensor.to(at::kCPU)).detach().to(at::kCPU).contiguous();
    MCB_CHECK(value.sizes() == at::IntArrayRef(saved.shape) && value.scalar_type() == saved.dtype, "converter: '", name,
              "' became ", value.sizes(), " ", value.scalar_type(), ", it was announced as ",
              at::IntArrayRef(saved.shape), " ", saved.dtype);
    writer.write_box(saved.name, value.numel(), {0, 0, 1, value.numel()}, value.const_data_ptr(),
                     static_cast<uint64_t>(value.element_size()));
  }

 private:
  std::unique_ptr<TensorEncoder> plain_;
  const Convert& convert_;
  mutable std::map<std::string, std::optional<SavedTensor>> saved_;
};

/// Collective. Tensors a converter changes are gathered one after the other and written by rank 0.
void write_changed(const Chunks& chunks, const Selection& selection, const ConvertingEncoder& encoder,
                   const std::filesystem::path& folder, const ShardLayout& layout) {
  WeightExporter exporter(chunks, {.peft_format = selection.peft_format,
                                   .adapter_name = selection.adapter_name,
                                   .merge_lora = selection.merge_lora,
                                   .only_master = true,
                                   .names = encoder.changed()});
  ShardWriter writer(folder, layout);
  std::exception_ptr failure;  // the others are still sending: take everything before throwing
  std::string name;
  at::Tensor tensor;
  while (exporter.next(name, tensor)) {
    try {
      if (!failure) encoder.write_changed(name, tensor, writer);
    } catch (...) {
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
  writer.sync();
}

/// All ranks must mean the same files, which a converter that depends on the rank would break.
void check_same_layout(const ShardLayout& layout, const Group& world) {
  size_t hash = 0;
  for (const auto& file : layout.files) hash = hash * 31 + std::hash<std::string>()(file.name + file.header);
  const auto value = static_cast<int64_t>(hash >> 2);
  auto ends = at::tensor({value, -value}, at::kLong);
  world.all_reduce_max(ends);
  MCB_CHECK(
      ends[0].item<int64_t>() == -ends[1].item<int64_t>(),
      "save_weights: the ranks do not agree on the tensors' names and shapes; a converter must do the same on all");
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

  MCB_CHECK(
      options.quantization.empty() || (options.quantization == "fp8" && !options.peft_format && !options.convert),
      "save_weights: quantization '", options.quantization,
      "': fp8 is what whole models are saved in, without a converter; mcore-bridge export --quantize knows mxfp4 too");
  std::unique_ptr<TensorEncoder> encoder;
  const ConvertingEncoder* converting = nullptr;
  auto extra_files = options.extra_files;
  ShardLayout layout;
  std::vector<PlannedParameter> parameters;
  std::unique_ptr<AtomicFolder> target;
  const auto token = common_token(parallel.world);
  step([&] {
    at::NoGradGuard no_grad;
    parameters = owned_parameters(chunks, selection);
    std::vector<StoredTensor> stored;
    const auto tensors = whole_checkpoint(chunks, selection);
    const auto dtype = model.config().params_dtype;
    encoder = options.quantization.empty() ? plain_encoder(dtype) : fp8_encoder(dtype, tensors, model.fp8_scales);
    if (options.convert) {
      auto wrapped = std::make_unique<ConvertingEncoder>(std::move(encoder), options.convert);
      converting = wrapped.get();
      encoder = std::move(wrapped);
    }
    for (auto& [name, content] : extra_files) {
      if (!options.quantization.empty() && name == "config.json") content = fp8_config_text(content, tensors);
    }
    for (const auto& tensor : tensors) {
      for (auto& part : encoder->stored(tensor)) stored.push_back(std::move(part));
    }
    layout = shard_layout(stored, options.max_shard_bytes, options.peft_format ? "adapter_model" : "model");
    for (const auto& [name, content] : extra_files) {
      MCB_CHECK(!name.empty() && name.find('/') == std::string::npos && name[0] != '.', "save_weights: extra file '",
                name, "' is no plain file name");
    }
    target = std::make_unique<AtomicFolder>(folder, token);
  });
  check_same_layout(layout, parallel.world);
  const auto whole = in_place(chunks, selection);
  const GatheredMasters masters(chunks);
  try {
    step([&] {
      if (!leader) return;
      target->begin();
      ShardWriter writer(target->staging(), layout);
      writer.create();
      writer.sync();
    });
    // Every copy of the model is the same; the first is written.
    const bool writes = parallel.place.copy == 0;
    if (writes) encoder->prepare(parameters, parallel.model);
    step([&] {
      if (!writes) return;
      const at::NoGradGuard no_grad;
      ShardWriter writer(target->staging(), layout);
      write_parameters(parameters, *encoder, writer, options.progress);
      writer.sync();
    });
    if (converting && !converting->changed().empty())
      step([&] { write_changed(chunks, selection, *converting, target->staging(), layout); });
    step([&] {
      if (!leader) return;
      for (const auto& [name, content] : extra_files) write_file(target->staging() / name, content);
      if (!layout.index.empty()) write_file(target->staging() / "model.safetensors.index.json", layout.index);
      target->commit([&](const std::string& name) { return is_replaced(name, options.peft_format); });
    });
  } catch (...) {
    if (leader) target->abandon();
    throw;
  }
}

}  // namespace mcore_bridge
