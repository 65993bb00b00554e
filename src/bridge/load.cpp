#include <ATen/ATen.h>

#include <set>

#include "bridge/checkpoint_plan.h"
#include "bridge/checkpoint_reader.h"
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

/// The tensor in the file as a matrix, without copying.
at::Tensor mapped_matrix(const CheckpointReader::Tensor& source, const HfTensor& tensor) {
  auto* data = const_cast<std::byte*>(source.file->data(*source.entry));  // read-only pages; only ever copied from
  return at::from_blob(data, {tensor.rows, tensor.cols}, at::TensorOptions().dtype(source.entry->dtype));
}

/// What Transformers writes or ignores itself: nothing to tell the user.
bool ignorable(const std::string& name, bool tied) {
  return name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight");
}

LoadReport load(const Chunks& chunks, const std::string& folder, const LoadOptions& options) {
  const Selection selection{.peft_format = options.peft_format, .adapter_name = options.adapter_name};
  const CheckpointReader reader(folder, options.peft_format);
  const auto parameters = planned_parameters(chunks, selection);
  const bool tied = !chunks[0]->config().untie_embeddings_and_output_weights;

  // Everything is checked before anything is copied. The whole checkpoint is looked at, so that every rank finds the
  // same.
  LoadReport report;
  std::vector<std::string> wrong;
  std::set<std::string> known;
  for (const auto& tensor : whole_checkpoint(chunks, selection)) {
    known.insert(tensor.name);
    const auto* found = reader.find(tensor.name);
    if (!found) {
      report.missing.push_back(tensor.name);
      continue;
    }
    const at::IntArrayRef shape(found->entry->shape);
    if (shape != at::IntArrayRef(tensor.sizes())) {
      std::ostringstream text;
      text << tensor.name << " is " << shape << ", the model needs " << at::IntArrayRef(tensor.sizes());
      wrong.push_back(text.str());
    } else if (!c10::isFloatingType(found->entry->dtype) || c10::elementSize(found->entry->dtype) < 2) {
      wrong.push_back(
          tensor.name + " is " + found->entry->dtype_name +
          ", the model needs a 16, 32 or 64 bit floating point weight" +
          (c10::elementSize(found->entry->dtype) == 1 ? " (quantised checkpoints are not read by this version)" : ""));
    }
  }
  for (const auto& [name, tensor] : reader.tensors()) {
    if (!known.contains(name) && !ignorable(name, tied)) report.unexpected.push_back(name);
  }
  MCB_CHECK(wrong.empty(), "load_weights: ", folder, ": ", wrong.size(), " tensors do not fit:", joined(wrong));
  if (options.strict && !report.missing.empty()) {
    const bool head = report.missing.size() == 1 && report.missing[0] == "lm_head.weight";
    fail<KeyError>(
        "load_weights: ", folder, ": ", report.missing.size(), " tensors are missing:", joined(report.missing),
        head ? "\n(tie_word_embeddings is false in config.json, so the output layer needs its own matrix)" : "");
  }

  at::NoGradGuard no_grad;
  for (const auto& parameter : parameters) {
    auto target = as_matrix(parameter.tensor.detach());
    int64_t covered = 0;
    for (const auto& region : parameter.plan.regions) covered += region.rows * region.cols;
    if (covered < target.numel()) target.zero_();  // padding of the vocabulary
    for (const auto& region : parameter.plan.regions) {
      const auto& tensor = parameter.plan.tensors[region.tensor];
      const auto* source = reader.find(tensor.name);
      if (!source) continue;
      const auto bytes = region.rows * region.cols * static_cast<int64_t>(c10::elementSize(source->entry->dtype));
      report.bytes_needed += bytes;
      box(target, region.row, region.col, region.rows, region.cols)
          .copy_(box(mapped_matrix(*source, tensor), region.hf_row, region.hf_col, region.rows, region.cols));
      report.bytes_read += bytes;
    }
  }
  return report;
}

}  // namespace

LoadReport load_weights(const Chunks& chunks, const std::string& folder, const LoadOptions& options) {
  MCB_CHECK(!chunks.empty(), "load_weights: no model given");
  LoadReport report;
  together(chunks[0]->parallel().world, [&] { report = load(chunks, folder, options); });
  return report;
}

}  // namespace mcore_bridge
