#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <mutex>
#include <set>

#include "bridge/checkpoint_plan.h"
#include "bridge/checkpoint_reader.h"
#include "bridge/parameter_reader.h"
#include "bridge/region_blocks.h"
#include "bridge/tensor_source.h"
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

/// A tensor that a converter makes: whole when the first box is read, gone after the last.
class ConvertedSource : public TensorSource {
 public:
  ConvertedSource(std::string name, const Conversion::Changed& changed, int64_t cols)
      : name_(std::move(name)), changed_(changed), cols_(cols) {}
  c10::ScalarType dtype() const override { return changed_.dtype; }
  uint64_t file_bytes(const Box&) const override { return 0; }  // CheckpointReader counts what the converter reads
  Position position(const Box& box) const override { return {name_, static_cast<uint64_t>(box.row * cols_ + box.col)}; }
  void expect(const Box&) const override { ++expected_; }
  void read(const Box& box, void* to) const override {
    at::Tensor value;
    {
      const std::scoped_lock lock(mutex_);
      if (!value_.defined()) {
        value_ = changed_.value().detach().to(at::kCPU).contiguous();
        MCB_CHECK(value_.sizes() == at::IntArrayRef(changed_.shape) && value_.scalar_type() == changed_.dtype,
                  "converter: '", name_, "' is ", value_.sizes(), " ", value_.scalar_type(), ", it was announced as ",
                  at::IntArrayRef(changed_.shape), " ", changed_.dtype);
      }
      value = value_;
      if (--expected_ == 0) value_ = at::Tensor();
    }
    auto target = at::from_blob(to, {box.rows, box.cols}, at::TensorOptions().dtype(changed_.dtype));
    copy_on_this_thread(target, value.view({-1, cols_}).narrow(0, box.row, box.rows).narrow(1, box.col, box.cols));
  }

 private:
  const std::string name_;
  const Conversion::Changed& changed_;
  const int64_t cols_;
  mutable std::mutex mutex_;
  mutable at::Tensor value_;
  mutable int64_t expected_ = 0;
};

OpenedTensor open_converted(const Conversion& conversion, const HfTensor& tensor) {
  const auto found = conversion.changed.find(tensor.name);
  if (found == conversion.changed.end()) return {};
  OpenedTensor result{.used = {tensor.name}};
  const auto& [shape, dtype, value] = found->second;
  std::ostringstream wrong;
  if (shape != tensor.sizes()) {
    wrong << "is made " << at::IntArrayRef(shape) << " by the converter, the model needs "
          << at::IntArrayRef(tensor.sizes());
  } else if (!c10::isFloatingType(dtype) || c10::elementSize(dtype) < 2) {
    wrong << "is made " << dtype << " by the converter, the model needs a floating point weight";
  }
  result.wrong = wrong.str();
  if (result.wrong.empty())
    result.source = std::make_shared<ConvertedSource>(tensor.name, found->second, stored_columns(tensor));
  return result;
}

/// "model.layers.0.mlp" of "model.layers.0.mlp.gate.weight": names that share it belong to one module.
std::string module_of(const std::string& name) { return name.substr(0, name.rfind('.')); }

/// Finds every tensor of the whole checkpoint, so that every rank finds the same, and checks all before anything is
/// copied.
Sources open_sources(const CheckpointReader& reader, const Conversion& conversion, const Chunks& chunks,
                     const Selection& selection, const std::string& folder, bool strict, LoadReport& report) {
  const bool tied = !chunks[0]->config().untie_embeddings_and_output_weights;
  std::vector<std::string> wrong, foreign;
  std::set<std::string> used, modules;
  Sources sources;
  const auto quantization = quantization_of(folder, reader);
  for (const auto& tensor : whole_checkpoint(chunks, selection)) {
    auto opened = open_converted(conversion, tensor);
    if (opened.used.empty()) opened = open_tensor(reader, tensor, quantization);
    modules.insert(module_of(tensor.name));
    used.insert(opened.used.begin(), opened.used.end());
    if (opened.source) {
      sources[tensor.name] = std::move(opened.source);
    } else if (opened.used.empty()) {
      report.missing.push_back(tensor.name);
    } else {
      wrong.push_back(tensor.name + " " + opened.wrong);
    }
  }
  auto unexpected = [&](const std::string& name) {
    if (used.contains(name) || ignorable(name, tied)) return;
    report.unexpected.push_back(name);
    if (modules.contains(module_of(name))) foreign.push_back(name);
  };
  for (const auto& [name, tensor] : reader.tensors()) unexpected(name);
  for (const auto& [name, changed] : conversion.changed) unexpected(name);
  if (wrong.empty() && !(strict && (!report.missing.empty() || !foreign.empty()))) return sources;

  std::string text = "load_weights: " + folder + ":";
  auto list = [&](const std::vector<std::string>& names, const char* what) {
    if (names.empty()) return;
    text += '\n';
    text += std::to_string(names.size()) + " tensors " + what + ":" + joined(names);
  };
  list(wrong, "do not fit");
  if (strict) {
    list(report.missing, "are missing");
    if (report.missing == std::vector<std::string>{"lm_head.weight"})
      text += "\n(tie_word_embeddings is false in config.json, so the output layer needs its own matrix)";
    if (wrong.empty() && report.missing.empty()) {
      list(foreign, "belong to layers of the model that have no such part");
    } else {
      list(report.unexpected, "are unexpected");
    }
    text += "\n(strict=False loads what there is)";
    if (!report.missing.empty()) throw KeyError(text);
  }
  throw ValueError(text);
}

LoadReport load(const Chunks& chunks, const std::string& folder, const LoadOptions& options) {
  const Selection selection{.peft_format = options.peft_format, .adapter_name = options.adapter_name};
  CheckpointReader reader(folder, options.peft_format);
  Conversion conversion;
  if (options.convert) {
    conversion = options.convert(reader);
    reader.rename(conversion.names);
  }
  const auto parameters = planned_parameters(chunks, selection);
  LoadReport report;
  const auto sources = open_sources(reader, conversion, chunks, selection, folder, options.strict, report);

  const at::NoGradGuard no_grad;
  ParameterReader(sources, parameters, options.progress).run(chunks[0]->parallel().tp, report);
  note_weights_written(/*frozen=*/true);
  if (!options.peft_format) chunks[0]->fp8_scales.clear();
  for (const auto& [name, source] : sources) {
    if (source->scales()) chunks[0]->fp8_scales[name] = *source->scales();
  }
  report.bytes_needed += static_cast<int64_t>(reader.bytes_loaded());  // whole tensors a converter asked for
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
