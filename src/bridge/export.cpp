#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <deque>
#include <optional>

#include "bridge/checkpoint_plan.h"
#include "bridge/formats/fp8_blocks.h"
#include "bridge/formats/quantization.h"
#include "bridge/region_blocks.h"
#include "bridge/tensor_encoder.h"
#include "mcore_bridge/error.h"
#include "models/gathered_masters.h"
#include "models/gpt_model.h"

namespace mcore_bridge {
namespace {

/// A box of a tensor that one rank owns and sends.
struct Part {
  int rank = 0;
  Box box;
};

/// Every rank's parts of every tensor, in the order in which a rank packs them: tensor by tensor as listed, then as in
/// its plan. Collective (two gathers of small host tensors).
std::vector<std::vector<Part>> gather_parts(const std::vector<HfTensor>& tensors,
                                            const std::map<std::string, std::vector<OwnedRegion>>& owned,
                                            const Group& group) {
  constexpr int64_t kFields = 5;
  std::vector<int64_t> mine;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto found = owned.find(tensors[i].name);
    if (found == owned.end()) continue;
    for (const auto& [parameter, region] : found->second) {
      const auto box = stored_box(tensors[i], *region);
      mine.insert(mine.end(), {static_cast<int64_t>(i), box.row, box.col, box.rows, box.cols});
    }
  }
  const auto counts = group.all_gather(at::tensor({static_cast<int64_t>(mine.size())}, at::kLong));
  const auto most = counts.max().item<int64_t>();
  mine.resize(static_cast<size_t>(most));
  const auto all = group.all_gather(at::tensor(mine, at::kLong).view({1, most}));
  std::vector<std::vector<Part>> parts(tensors.size());
  for (int rank = 0; rank < group.size(); ++rank) {
    const auto* row = all.const_data_ptr<int64_t>() + rank * most;
    for (int64_t at = 0; at < counts[rank].item<int64_t>(); at += kFields)
      parts.at(static_cast<size_t>(row[at])).push_back({rank, {row[at + 1], row[at + 2], row[at + 3], row[at + 4]}});
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    int64_t covered = 0;
    for (const auto& part : parts[i]) covered += part.box.numel();
    TORCH_INTERNAL_ASSERT(covered == tensors[i].numel(), "export: the ranks own ", covered, " elements of ",
                          tensors[i].name, ", which has ", tensors[i].numel());
  }
  return parts;
}

}  // namespace

/// A bucket is a run of tensors. Every rank packs the parts it owns into one payload; payloads are broadcast (or sent
/// to rank 0), and the tensors are put together from them. A tensor that one rank owns whole is a view of its payload.
struct WeightExporter::State {
  Chunks chunks;
  ExportOptions options;
  std::unique_ptr<MaterialisedParameters> whole;
  std::optional<GatheredMasters> masters;
  Group group;  // all ranks that own parts of one copy of the model
  std::vector<PlannedParameter> parameters;
  std::vector<HfTensor> tensors;
  std::map<std::string, std::vector<OwnedRegion>> owned;
  std::vector<std::vector<Part>> parts;  // by tensor
  c10::ScalarType dtype;
  c10::Device device = c10::kCPU;
  std::unique_ptr<Fp8WholeWeights> fp8;
  const PlannedParameter* cached = nullptr;  // parts of a fused parameter follow one another
  at::Tensor cached_value;

  struct Bucket {
    size_t begin = 0, end = 0;         // tensors
    std::vector<at::Tensor> payloads;  // by rank; undefined where this rank does not get it
    std::shared_ptr<Group::Pending> pending;
  };
  size_t next_tensor = 0;
  std::optional<Bucket> under_way;
  std::deque<std::pair<std::string, at::Tensor>> ready;

  bool takes_part() const { return !options.only_master || group.ranks()[0] == 0; }
  bool receives() const { return !options.only_master || (group.ranks()[0] == 0 && group.rank() == 0); }

  /// Alike for all tensors of a bucket.
  c10::ScalarType dtype_of(const HfTensor& tensor) const { return plain_dtype(tensor, dtype); }

  at::Tensor payload(const Bucket& bucket, int64_t elements) {
    auto packed = at::empty({elements}, at::TensorOptions(device).dtype(dtype_of(tensors[bucket.begin])));
    int64_t at = 0;
    for (auto i = bucket.begin; i < bucket.end; ++i) {
      const auto found = owned.find(tensors[i].name);
      if (found == owned.end()) continue;
      for (const auto& [parameter, region] : found->second) {
        if (parameter != cached) cached_value = parameter->value();
        cached = parameter;
        const auto view = region_block(tensors[i], *region, cached_value).view;
        packed.narrow(0, at, view.numel()).view(view.sizes()).copy_(view);
        at += view.numel();
      }
    }
    return packed;
  }

  /// Packs the next bucket and starts its journey.
  void start() {
    const at::NoGradGuard no_grad;
    if (next_tensor == tensors.size() || !takes_part()) return;
    Bucket bucket{.begin = next_tensor, .end = next_tensor};
    int64_t bytes = 0;
    const auto kind = dtype_of(tensors[next_tensor]);
    auto bytes_of = [&](size_t i) { return tensors[i].numel() * static_cast<int64_t>(c10::elementSize(kind)); };
    while (bucket.end < tensors.size() && dtype_of(tensors[bucket.end]) == kind &&
           (bucket.end == bucket.begin || bytes + bytes_of(bucket.end) <= options.bucket_bytes))
      bytes += bytes_of(bucket.end++);
    next_tensor = bucket.end;

    std::vector<int64_t> elements(static_cast<size_t>(group.size()));
    for (auto i = bucket.begin; i < bucket.end; ++i) {
      for (const auto& part : parts[i]) elements[part.rank] += part.box.numel();
    }
    bucket.payloads.resize(elements.size());
    std::vector<std::pair<at::Tensor, int>> broadcasts;
    std::vector<Group::Message> messages;
    for (int rank = 0; rank < group.size(); ++rank) {
      auto& payload_ = bucket.payloads[rank];
      if (elements[rank] == 0) continue;
      if (rank == group.rank()) {
        payload_ = payload(bucket, elements[rank]);
        if (!receives()) messages.push_back({payload_, 0, true});
      } else if (receives()) {
        payload_ = at::empty({elements[rank]}, at::TensorOptions(device).dtype(kind));
        if (options.only_master) messages.push_back({payload_, rank, false});
      }
      if (!options.only_master) broadcasts.emplace_back(payload_, rank);
    }
    bucket.pending =
        options.only_master ? group.start_exchange(std::move(messages)) : group.start_broadcasts(std::move(broadcasts));
    under_way = std::move(bucket);
  }

  /// Waits for the bucket under way and puts its tensors together.
  void finish() {
    const at::NoGradGuard no_grad;
    auto bucket = std::move(*under_way);
    under_way.reset();
    if (bucket.pending) bucket.pending->wait();
    if (!receives()) return;  // dropping the bucket waits for its sends
    std::vector<int64_t> at(static_cast<size_t>(group.size()));
    for (auto i = bucket.begin; i < bucket.end; ++i) {
      const auto& tensor = tensors[i];
      const auto columns = stored_columns(tensor);
      at::Tensor whole;
      for (const auto& [rank, box] : parts[i]) {
        const auto part = bucket.payloads[rank].narrow(0, at[rank], box.numel());
        at[rank] += box.numel();
        if (box.numel() == tensor.numel()) {
          whole = part;
          continue;
        }
        if (!whole.defined()) whole = at::empty({tensor.numel()}, part.options());
        whole.view({-1, columns})
            .narrow(0, box.row, box.rows)
            .narrow(1, box.col, box.cols)
            .copy_(part.view({box.rows, box.cols}));
      }
      if (!whole.defined()) whole = at::empty({0}, at::TensorOptions(device).dtype(dtype_of(tensor)));
      whole = whole.view(tensor.sizes());
      if (fp8 && is_fp8_weight(tensor)) {
        auto [codes, scale] = fp8->quantize(tensor.name, whole);
        ready.emplace_back(tensor.name, std::move(codes));
        ready.emplace_back(fp8_scale_name(tensor.name), std::move(scale));
      } else {
        ready.emplace_back(tensor.name, std::move(whole));
      }
    }
  }
};

WeightExporter::WeightExporter(Chunks chunks, ExportOptions options) : state_(std::make_unique<State>()) {
  MCB_CHECK(!chunks.empty(), "export_weights: no model given");
  MCB_CHECK(options.bucket_bytes > 0, "export_weights: bucket_bytes must be positive");
  MCB_CHECK(options.quantization.empty() || (options.quantization == "fp8" && !options.peft_format),
            "export_weights: quantization '", options.quantization, "': fp8 is what whole models are exported in");
  auto& state = *state_;
  const Selection selection{options.peft_format, options.adapter_name, options.merge_lora};
  const auto& model = *chunks[0];
  state.group = model.parallel().model;
  state.dtype = model.config().params_dtype;
  state.device = model.device();
  state.parameters = owned_parameters(chunks, selection);
  state.whole = in_place(chunks, selection);
  state.masters.emplace(chunks);
  state.tensors = whole_checkpoint(chunks, selection);
  if (!options.names.empty())
    std::erase_if(state.tensors, [&](const auto& tensor) { return !options.names.contains(tensor.name); });
  if (!options.quantization.empty()) {
    MCB_CHECK(std::any_of(state.tensors.begin(), state.tensors.end(), is_fp8_weight),
              "export_weights: quantization fp8: the checkpoint has no linear weight to quantise");
    state.fp8 = std::make_unique<Fp8WholeWeights>(state.tensors, model.fp8_scales, state.group);
  }
  state.owned = owned_regions(state.parameters);
  state.parts = gather_parts(state.tensors, state.owned, state.group);
  state.options = std::move(options);
  state.chunks = std::move(chunks);
}

WeightExporter::~WeightExporter() = default;

int64_t WeightExporter::count() const {
  const auto& tensors = state_->tensors;
  return static_cast<int64_t>(tensors.size()) +
         (state_->fp8 ? std::count_if(tensors.begin(), tensors.end(), is_fp8_weight) : 0);
}

bool WeightExporter::next(std::string& name, at::Tensor& tensor) {
  auto& state = *state_;
  while (state.ready.empty()) {
    if (!state.under_way) state.start();
    if (!state.under_way) return false;
    state.finish();
    state.start();
  }
  std::tie(name, tensor) = std::move(state.ready.front());
  state.ready.pop_front();
  return true;
}

}  // namespace mcore_bridge
