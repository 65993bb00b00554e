#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <deque>

#include "bridge/checkpoint_plan.h"
#include "mcore_bridge/error.h"
#include "models/gpt_model.h"

namespace mcore_bridge {

/// Tensors are assembled in buckets: each rank puts what it owns into a zeroed buffer, and one integer sum over the
/// model-parallel ranks joins the parts. Every byte has one owner, so the sum is exact for any bit pattern.
struct WeightExporter::State {
  Chunks chunks;
  std::unique_ptr<MaterialisedParameters> whole;
  std::vector<PlannedParameter> parameters;
  std::vector<HfTensor> tensors;
  std::map<std::string, std::vector<OwnedRegion>> owned;
  int64_t bucket_bytes;
  size_t next_tensor = 0;
  std::deque<std::pair<std::string, at::Tensor>> ready;

  int64_t bytes_of(const HfTensor& tensor) const {
    return tensor.rows * tensor.cols * static_cast<int64_t>(c10::elementSize(chunks[0]->config().params_dtype));
  }

  void fill() {
    at::NoGradGuard no_grad;
    constexpr int64_t kWord = 8;
    const auto& model = *chunks[0];
    const auto dtype = model.config().params_dtype;
    size_t end = next_tensor;
    int64_t bytes = 0;
    while (end < tensors.size() && (end == next_tensor || bytes + bytes_of(tensors[end]) <= bucket_bytes)) {
      bytes += (bytes_of(tensors[end++]) + kWord - 1) / kWord * kWord;
    }
    auto buffer = at::zeros({bytes / kWord}, at::TensorOptions(model.device()).dtype(at::kLong));
    const auto elements = buffer.view(dtype);
    const PlannedParameter* cached = nullptr;  // parts of a fused parameter follow one another
    at::Tensor value;
    for (int64_t at = 0; next_tensor < end; ++next_tensor) {
      const auto& tensor = tensors[next_tensor];
      auto flat = elements.narrow(0, at / static_cast<int64_t>(c10::elementSize(dtype)), tensor.rows * tensor.cols);
      auto matrix = flat.view({tensor.rows, tensor.cols});
      for (const auto& [parameter, region] : owned[tensor.name]) {
        if (parameter != cached) value = parameter->value();
        cached = parameter;
        box(matrix, region->hf_row, region->hf_col, region->rows, region->cols)
            .copy_(box(as_matrix(value), region->row, region->col, region->rows, region->cols));
      }
      ready.emplace_back(tensor.name, flat.view(tensor.sizes()));
      at += (bytes_of(tensor) + kWord - 1) / kWord * kWord;
    }
    model.parallel().model.all_reduce(buffer);
  }
};

WeightExporter::WeightExporter(Chunks chunks, SaveOptions options, int64_t bucket_bytes)
    : state_(std::make_unique<State>()) {
  MCB_CHECK(!chunks.empty(), "export_weights: no model given");
  const Selection selection{options.peft_format, options.adapter_name, options.merge_lora};
  state_->parameters = planned_parameters(chunks, selection);
  state_->whole = in_place(chunks, selection);
  state_->tensors = whole_checkpoint(chunks, selection);
  state_->owned = owned_regions(state_->parameters);
  state_->bucket_bytes = bucket_bytes;
  state_->chunks = std::move(chunks);
}

WeightExporter::~WeightExporter() = default;

int64_t WeightExporter::count() const { return static_cast<int64_t>(state_->tensors.size()); }

bool WeightExporter::next(std::string& name, at::Tensor& tensor) {
  if (state_->ready.empty() && state_->next_tensor < state_->tensors.size()) state_->fill();
  if (state_->ready.empty()) return false;
  std::tie(name, tensor) = std::move(state_->ready.front());
  state_->ready.pop_front();
  return true;
}

}  // namespace mcore_bridge
