#include "train/micro_batch_graphs.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "config/rope_scaling.h"
#include "kernels/cuda/launch.h"
#include "layers/attention/core_attention.h"
#include "mcore_bridge/error.h"
#include "train/graph_shape.h"

namespace mcore_bridge {
namespace {

constexpr size_t kMostShapes = 1024;  // remembered without a graph: most may never come back

void check_recordable(const GPTModel& model) {
  const auto& config = model.config();
  const auto& sizes = model.parallel().topology.sizes();
  auto one = [](const char* name, int64_t size) {
    MCB_CHECK(size == 1, "cuda_graph_impl: ", name, " ", size,
              " communicates inside a micro-batch, which is not recorded by this version; use cuda_graph_impl none");
  };
  one("pipeline_model_parallel_size", sizes.pipeline);
  one("tensor_model_parallel_size", sizes.tensor);
  one("context_parallel_size", sizes.context);
  MCB_CHECK(!config.is_moe(),
            "cuda_graph_impl: which experts get how many tokens changes with every micro-batch, so mixture-of-experts "
            "models cannot be recorded; use cuda_graph_impl none");
  MCB_CHECK(!config.attention_chunk_size && config.softmax_type == "vanilla",
            "cuda_graph_impl: attention in chunks or with sinks plans on the host, which cannot be recorded; use "
            "cuda_graph_impl none");
  // core_attn and layernorm are recomputed inside kernels and nodes of ours.
  MCB_CHECK(config.recompute_granularity != "full" && !config.recomputes("mlp"),
            "cuda_graph_impl: recompute_granularity '", *config.recompute_granularity, "'",
            config.recomputes("mlp") ? " of mlp" : "",
            " saves random states on the host, which cannot be recorded; use one of them");
  MCB_CHECK(!config.cpu_offloading, "cuda_graph_impl: cpu_offloading waits for copies on the host; use one of them");
  MCB_CHECK(!rope_depends_on_length(config),
            "cuda_graph_impl: this model's rope_scaling depends on the length of the row; use cuda_graph_impl none");
  if (config.fp8) {
    MCB_CHECK(
        config.fp8_recipe != "delayed",
        "cuda_graph_impl: fp8_recipe 'delayed' changes how it scales after the first step, which cannot be recorded; "
        "use tensorwise or blockwise, or cuda_graph_impl none");
    for (const auto& parameter : model.named_parameters()) {
      const auto& name = parameter.name;
      const bool weight = name.starts_with("decoder.layers.") && name.ends_with(".weight") &&
                          name.find("linear_") != std::string::npos && name.find(".lora_") == std::string::npos;
      const bool codes = parameter.tensor.scalar_type() == at::kFloat8_e4m3fn;  // rewritten where they lie
      MCB_CHECK(!weight || codes || !parameter.tensor.requires_grad(), "cuda_graph_impl: with fp8, '", name,
                "' is quantised once a step on the host's order, which cannot be recorded; keep the weights in FP8 "
                "(fp8_param), train an adapter, or use cuda_graph_impl none");
    }
  }
  MCB_CHECK(model.device().is_cuda(), "cuda_graph_impl: 'local' needs a GPU, the model is on ", model.device());
  MCB_CHECK(cuda::built(), "cuda_graph_impl: this build has no CUDA kernels; build with MCB_CUDA=ON");
}

}  // namespace

MicroBatchGraphs::MicroBatchGraphs(const GPTModel& model, const OptimizerOptions& options)
    : model_(model), warmup_(options.cuda_graph_warmup_steps) {
  check_recordable(model);
  shared_shapes_ = !attention_reads_host_ends(model.config(), model.device());
  recorder_ = cuda::make_graph_recorder(std::max<int>(0, model.device().index()));
  loss_ = at::zeros({}, at::TensorOptions(model.device()).dtype(at::kDouble));
}

std::vector<bool> MicroBatchGraphs::fresh() const {
  std::vector<bool> result;
  for (const auto& gradient : gradients_) result.push_back(gradient->fresh);
  return result;
}

MicroBatchGraphs::Key MicroBatchGraphs::key_of(const ForwardInput& batch) const {
  auto key = shape_key(batch);
  // A gradient's first contribution overwrites what was there.
  int64_t word = 1;
  for (const auto& gradient : gradients_) {
    word = word << 1 | (gradient->fresh ? 1 : 0);
    if (word < int64_t{1} << 62) continue;
    key.push_back(word);
    word = 1;
  }
  key.push_back(word);
  return key;
}

void MicroBatchGraphs::forget() {
  if (entries_.size() <= kMostShapes && std::count_if(entries_.begin(), entries_.end(), [](const auto& e) {
                                          return e.second.graph != nullptr;
                                        }) <= static_cast<int64_t>(kMost))
    return;
  const bool graphs = entries_.size() <= kMostShapes;  // one of those with a graph, or any
  auto oldest = entries_.end();
  for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
    if (graphs && !entry->second.graph) continue;
    if (oldest == entries_.end() || entry->second.last < oldest->second.last) oldest = entry;
  }
  entries_.erase(oldest);
}

void MicroBatchGraphs::run(const ForwardInput& given, const std::function<void(const ForwardInput&)>& work) {
  if (gradients_.empty()) {
    for (const auto& parameter : model_.named_parameters()) {
      if (auto gradient = main_gradient(parameter.tensor)) gradients_.push_back(std::move(gradient));
    }
    for (const auto& gradient : gradients_) gradient->fixed = true;
  }
  const auto batch = shared_shapes_ && given.packed ? in_graph_shape(given) : given;
  auto& entry = entries_[key_of(batch)];
  entry.last = ++clock_;
  if (!entry.graph && entry.runs++ < warmup_) {
    GraphInput input(batch, model_.device());
    input.fill(batch);
    recorder_->run([&] { work(input.batch()); });
    forget();
    return;
  }
  if (!entry.graph) {
    entry.input.emplace(batch, model_.device());
    entry.input->fill(batch);
    entry.graph = recorder_->record([&] { work(entry.input->batch()); });
    entry.fresh_after = fresh();
    ++recorded_;
  } else {
    entry.input->fill(batch);
    for (size_t i = 0; i < gradients_.size(); ++i) gradients_[i]->fresh = entry.fresh_after[i];
  }
  entry.graph->replay();
  ++replayed_;
  forget();
}

}  // namespace mcore_bridge
