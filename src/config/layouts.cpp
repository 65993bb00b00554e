#include "mcore_bridge/layouts.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include "config/layout_rules.h"
#include "config/pipeline_layout.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

void check_run(const Layout& l, bool sequence_parallel) {
  const auto& run = l.run;
  MCB_CHECK(run.processes >= 0 && run.micro_batch_size >= 0 && run.global_batch_size >= 0 && run.sequence_length >= 0,
            "processes, batch sizes and sequence length must not be negative");
  if (run.processes > 0) {
    MCB_CHECK(run.processes % l.model_ranks() == 0, "tensor_model_parallel_size ", l.tensor,
              " x pipeline_model_parallel_size ", l.pipeline, " x context_parallel_size ", l.context, " = ",
              l.model_ranks(), " does not divide the ", run.processes, " processes");
    if (run.micro_batch_size > 0 && run.global_batch_size > 0) {
      const auto rows = run.micro_batch_size * l.data();
      MCB_CHECK(run.global_batch_size % rows == 0, "global_batch_size ", run.global_batch_size,
                " is no multiple of micro_batch_size ", run.micro_batch_size, " x ", l.data(),
                " data-parallel ranks = ", rows);
    }
  }
  if (run.sequence_length > 0) {
    const auto pieces = (l.context > 1 ? 2 * l.context : 1) * (sequence_parallel ? l.tensor : 1);
    MCB_CHECK(run.sequence_length % pieces == 0, "the sequence length ", run.sequence_length, " does not divide by ",
              pieces, l.context > 1 ? " (2 x context_parallel_size" : " (1",
              sequence_parallel ? " x tensor_model_parallel_size with sequence_parallel)" : ")", "; pad it");
  }
}

void check_all(const ModelConfig& config, const Layout& layout) {
  check_layout_rules(config);
  check_run(layout, config.sequence_parallel && layout.tensor > 1);
  if (!config.is_moe() || layout.run.processes == 0) return;
  const auto slices = config.expert_tensor_parallel_size.value_or(layout.tensor);
  const auto expert_ranks = slices * layout.expert * layout.pipeline;
  MCB_CHECK(layout.run.processes % expert_ranks == 0, "expert_tensor_parallel_size ", slices,
            " x expert_model_parallel_size ", layout.expert, " x pipeline_model_parallel_size ", layout.pipeline, " = ",
            expert_ranks, " does not divide the ", layout.run.processes, " processes");
}

template <class Check>
bool passes(Check check) {
  try {
    check();
    return true;
  } catch (const Error&) {
    return false;
  }
}

/// Sizes one dimension may take: those of `candidates` that work with all the others at 1.
template <class Set>
IntList alone(const ModelConfig& config, const IntList& candidates, Set set) {
  IntList result;
  for (const auto size : candidates) {
    Layout layout;
    set(layout, size);
    if (size == 1 || passes([&] { check_layout_rules(with_layout(config, layout)); })) result.push_back(size);
  }
  return result;
}

IntList divisors(int64_t number) {
  IntList result;
  for (int64_t n = 1; n * n <= number; ++n) {
    if (number % n != 0) continue;
    result.push_back(n);
    if (n * n != number) result.push_back(number / n);
  }
  std::sort(result.begin(), result.end());
  return result;
}

IntList up_to(int64_t most) {
  IntList result(static_cast<size_t>(std::max<int64_t>(1, most)));
  std::iota(result.begin(), result.end(), 1);
  return result;
}

IntList powers_of_two(int64_t most) {
  IntList result;
  for (int64_t n = 1; n <= most; n *= 2) result.push_back(n);
  return result;
}

double distance(int64_t size, int64_t asked) {
  return std::abs(
      std::log2(static_cast<double>(std::max<int64_t>(1, size)) / static_cast<double>(std::max<int64_t>(1, asked))));
}

/// The multiple of `unit` nearest to `value`.
int64_t rounded(int64_t value, int64_t unit) { return std::max<int64_t>(1, (value + unit / 2) / unit) * unit; }

/// Batch and sequence made to fit the parallel sizes.
Layout with_fitting_run(Layout layout, bool sequence_parallel) {
  auto& run = layout.run;
  if (run.processes > 0 && run.micro_batch_size > 0 && run.global_batch_size > 0)
    run.global_batch_size = rounded(run.global_batch_size, run.micro_batch_size * layout.data());
  const auto pieces = (layout.context > 1 ? 2 * layout.context : 1) * (sequence_parallel ? layout.tensor : 1);
  if (run.sequence_length > 0 && run.sequence_length % pieces != 0)
    run.sequence_length = (run.sequence_length + pieces - 1) / pieces * pieces;
  return layout;
}

/// Combinations of sizes that work one by one, not yet checked together.
std::vector<Layout> combinations(const ModelConfig& config, const Layout& asked) {
  const auto processes = asked.run.processes;
  const auto layers = config.num_layers + 2;  // embedding and loss may count as layers
  const auto sizes = [&](int64_t most) { return processes > 0 ? divisors(processes) : up_to(most); };
  const auto tensor = alone(config, sizes(config.num_attention_heads), [](Layout& l, int64_t n) { l.tensor = n; });
  const bool may_account = !config.num_layers_in_first_pipeline_stage && !config.num_layers_in_last_pipeline_stage;
  auto pipeline =
      alone(config, sizes(layers), [&](Layout& l, int64_t n) { l.pipeline = n, l.account = asked.account; });
  if (may_account) {
    const auto more =
        alone(config, sizes(layers), [&](Layout& l, int64_t n) { l.pipeline = n, l.account = !asked.account; });
    pipeline.insert(pipeline.end(), more.begin(), more.end());
    std::sort(pipeline.begin(), pipeline.end());
    pipeline.erase(std::unique(pipeline.begin(), pipeline.end()), pipeline.end());
  }
  const auto context =
      alone(config, processes > 0 ? divisors(processes) : powers_of_two(2 * std::max<int64_t>(32, asked.context)),
            [](Layout& l, int64_t n) { l.context = n; });
  const auto expert =
      alone(config, sizes(std::max<int64_t>(1, asked.expert)), [](Layout& l, int64_t n) { l.expert = n; });
  std::vector<Layout> result;
  for (const auto t : tensor) {
    for (const auto p : pipeline) {
      for (const auto c : context) {
        if (processes > 0 && processes % (t * p * c) != 0) continue;
        for (const auto e : expert) {
          const auto most = p > 1 ? std::max<int64_t>(1, layers / p) : 1;
          for (int64_t v = 1; v <= most; ++v) {
            if (v > 1 && layers % (p * v) > 2) continue;  // of `layers`, up to two are none
            result.push_back({t, p, v, c, e, asked.account, asked.run});
            if (p > 1 && may_account) result.push_back({t, p, v, c, e, !asked.account, asked.run});
          }
        }
      }
    }
  }
  return result;
}

}  // namespace

Layout layout_of(const ModelConfig& config, const RunSizes& run) {
  return {config.tensor_model_parallel_size,
          config.pipeline_model_parallel_size,
          config.virtual_stages(),
          config.context_parallel_size,
          config.expert_model_parallel_size,
          config.account_for_embedding_in_pipeline_split && config.account_for_loss_in_pipeline_split,
          run};
}

ModelConfig with_layout(ModelConfig config, const Layout& layout) {
  // A layout of stages stays only where there are as many.
  if (static_cast<int64_t>(config.pipeline_model_parallel_layout.stages.size()) !=
      layout.pipeline * layout.virtual_pipeline)
    config.pipeline_model_parallel_layout = {};
  config.num_layers_per_virtual_pipeline_stage = {};  // layout.virtual_pipeline says it
  if (config.microbatch_group_size_per_vp_stage.value_or(layout.pipeline) < layout.pipeline)
    config.microbatch_group_size_per_vp_stage = layout.pipeline;
  config.tensor_model_parallel_size = layout.tensor;
  config.pipeline_model_parallel_size = layout.pipeline;
  config.virtual_pipeline_model_parallel_size = {};
  if (layout.virtual_pipeline > 1) config.virtual_pipeline_model_parallel_size = layout.virtual_pipeline;
  config.context_parallel_size = layout.context;
  config.expert_model_parallel_size = layout.expert;
  const bool accounts = config.account_for_embedding_in_pipeline_split && config.account_for_loss_in_pipeline_split;
  if (layout.account != accounts)
    config.account_for_embedding_in_pipeline_split = config.account_for_loss_in_pipeline_split = layout.account;
  return config;
}

void check_layout(const ModelConfig& config, const RunSizes& run) {
  auto derived = config;
  auto asked = layout_of(config, run);
  try {
    derive_virtual_stages(derived);
    asked = layout_of(derived, run);
    check_all(derived, asked);
  } catch (const ValueError& error) {
    const auto nearest = nearest_layouts(derived, run);
    if (nearest.empty() || nearest[0] == asked) throw;
    fail(error.what(), "; the nearest layout that works: ", layout_changes(nearest[0], asked));
  }
}

std::vector<Layout> possible_layouts(const ModelConfig& config, const RunSizes& run) {
  MCB_CHECK(run.processes > 0, "possible_layouts: the number of processes is missing");
  std::vector<Layout> result;
  for (auto& layout : combinations(config, layout_of(config, run))) {
    const auto split = with_layout(config, layout);
    if (passes([&] { check_all(split, layout); })) result.push_back(layout);
  }
  return result;
}

std::vector<Layout> nearest_layouts(const ModelConfig& config, const RunSizes& run, int count) {
  const auto asked = layout_of(config, run);
  std::vector<std::pair<double, Layout>> ordered;
  for (auto layout : combinations(config, asked)) {
    layout = with_fitting_run(layout, config.sequence_parallel && layout.tensor > 1);
    const auto far =
        distance(layout.tensor, asked.tensor) + distance(layout.pipeline, asked.pipeline) +
        distance(layout.virtual_pipeline, asked.virtual_pipeline) + distance(layout.context, asked.context) +
        distance(layout.expert, asked.expert) + distance(layout.run.global_batch_size, run.global_batch_size) +
        distance(layout.run.sequence_length, run.sequence_length) + (layout.account != asked.account ? 0.5 : 0.0);
    ordered.emplace_back(far, layout);
  }
  std::stable_sort(ordered.begin(), ordered.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<Layout> result;
  for (const auto& [far, layout] : ordered) {
    if (static_cast<int>(result.size()) == count) break;
    const auto split = with_layout(config, layout);
    if (passes([&] { check_all(split, layout); })) result.push_back(layout);
  }
  return result;
}

std::string layout_changes(const Layout& layout, const Layout& asked) {
  std::string text;
  auto field = [&](const char* name, int64_t value, int64_t before) {
    if (value != before) text += (text.empty() ? "" : ", ") + std::string(name) + " " + std::to_string(value);
  };
  field("tensor_model_parallel_size", layout.tensor, asked.tensor);
  field("pipeline_model_parallel_size", layout.pipeline, asked.pipeline);
  field("virtual_pipeline_model_parallel_size", layout.virtual_pipeline, asked.virtual_pipeline);
  field("context_parallel_size", layout.context, asked.context);
  field("expert_model_parallel_size", layout.expert, asked.expert);
  if (layout.account != asked.account) {
    const auto* value = layout.account ? " true" : " false";
    text += (text.empty() ? "" : ", ") + std::string("account_for_embedding_in_pipeline_split") + value +
            ", account_for_loss_in_pipeline_split" + value;
  }
  field("micro_batch_size", layout.run.micro_batch_size, asked.run.micro_batch_size);
  field("global_batch_size", layout.run.global_batch_size, asked.run.global_batch_size);
  field("sequence length", layout.run.sequence_length, asked.run.sequence_length);
  return text.empty() ? "as asked" : text;
}

}  // namespace mcore_bridge
