#include "planner/explain.h"

#include <algorithm>
#include <cstdio>

#include "planner/time.h"

namespace mcore_bridge {
namespace {

std::string number(double value) {
  char text[64];
  if (value >= 1e15 || (value != 0 && value < 1e-3)) {
    std::snprintf(text, sizeof text, "%.3g", value);
  } else if (value == static_cast<double>(static_cast<int64_t>(value))) {
    std::string digits = std::to_string(static_cast<int64_t>(value));
    for (auto at = static_cast<int64_t>(digits.size()) - 3; at > 0; at -= 3)
      digits.insert(static_cast<size_t>(at), ",");
    return digits;
  } else {
    std::snprintf(text, sizeof text, "%.4g", value);
  }
  return text;
}

std::string size(double bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (unit < 4 && bytes >= 1024) bytes /= 1024, ++unit;
  char text[64];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.2f %s", bytes, units[unit]);
  return text;
}

std::string seconds(double value) {
  char text[64];
  std::snprintf(text, sizeof text, "%.4g s", value);
  return text;
}

}  // namespace

std::vector<std::pair<std::string, std::string>> explain(const Plan& plan, const PlanRequest& request,
                                                         const PlannedStage& stage, const ParallelSizes& sizes) {
  const auto& config = request.config;
  const auto& worst = plan.worst_stage();
  const auto& memory = worst.memory;
  const auto& hardware = request.hardware;
  const auto shape = activation_shape(request);
  std::vector<std::pair<std::string, std::string>> lines;
  auto line = [&](const std::string& name, const std::string& text) { lines.emplace_back(name, text); };

  const auto& buffers = stage.buffers;
  const auto trainable = std::max<double>(1, static_cast<double>(worst.trainable));
  const auto ranks =
      number(sizes.data * sizes.context) + " data-parallel ranks" +
      (config.is_moe()
           ? " (experts over " +
                 number(sizes.tensor * sizes.context * sizes.data / (sizes.expert * sizes.expert_tensor)) + ")"
           : "");
  line("weights", number(static_cast<double>(worst.parameters)) + " parameters x " +
                      number(static_cast<double>(shape.element)) + " bytes" +
                      (buffers.sharding == Sharding::kParameters ? " / " + ranks : "") + " = " +
                      size(static_cast<double>(memory.weights)));
  line("gradients", number(static_cast<double>(worst.trainable)) + " trainable x " +
                        number(static_cast<double>(buffers.grad_element)) + " bytes" +
                        (buffers.sharding >= Sharding::kGradients ? " / " + ranks : "") + " = " +
                        size(static_cast<double>(memory.gradients)));
  line("optimizer", number(static_cast<double>(worst.trainable)) + " trainable: masters and states of " +
                        request.optimizer.optimizer +
                        (buffers.sharding != Sharding::kNone ? ", shared out over " + ranks : "") + ", " +
                        number(static_cast<double>(memory.optimizer) / trainable) +
                        " bytes each here = " + size(static_cast<double>(memory.optimizer)));
  int64_t saved = 0, layers = 0, per_layer = 0;
  for (const auto& chunk : stage.chunks) {
    for (const auto& segment : chunk.segments) {
      const auto device = segment.footprint.saved - (request.gpu_kernels ? segment.footprint.offloaded : 0);
      saved += device;
      layers += segment.layers;
      if (segment.layers > 0) per_layer = device / segment.layers;
    }
  }
  line("activations",
       number(worst.in_flight) + " micro-batches in flight x " + size(static_cast<double>(saved)) + " (" +
           number(static_cast<double>(layers)) + " layers of about " + size(static_cast<double>(per_layer)) + ", " +
           number(static_cast<double>(shape.tokens())) +
           " tokens each; the ends; hidden states between stages) = " + size(static_cast<double>(memory.activations)));
  if (memory.offloaded > 0)
    line("offloaded", "activations of the first " +
                          number(static_cast<double>(request.config.cpu_offloading_num_layers)) +
                          " layers wait in host memory: " + size(static_cast<double>(memory.offloaded)));
  if (config.is_moe()) {
    const auto experts = static_cast<double>(*config.num_moe_experts),
               topk = static_cast<double>(config.moe_router_topk);
    const double split = config.sequence_parallel ? sizes.tensor : 1, slices = sizes.expert_tensor;
    const double here = static_cast<double>(shape.tokens()) / split;
    const bool gathers = config.moe_token_dispatcher_type == "allgather" && sizes.expert > 1;
    line("experts", number(experts / sizes.expert) + " of " + number(experts) + " here" +
                        (slices > 1 ? ", 1/" + number(slices) + " of each" : "") + "; " + number(here) +
                        " tokens of this rank x " + number(topk) + " experts" +
                        (slices > 1 ? " x " + number(slices) + " ranks that share tokens" : "") +
                        (gathers ? " x " + number(sizes.expert) + " ranks that gather tokens" : "") + " = " +
                        number(here * topk * slices * (gathers ? sizes.expert : 1)) + " rows a layer, of an even load");
  }
  line("workspace", "temporaries of the worst moment of backward = " + size(static_cast<double>(memory.workspace)));
  line("reserve", size(request.reserve) + " outside the engine + " + number(100 * request.margin) +
                      "% of activations and workspace = " + size(static_cast<double>(memory.reserve)));
  line("total", size(static_cast<double>(memory.total())) + " on stage " + std::to_string(worst.stage) + " of " +
                    std::to_string(sizes.pipeline));

  for (const auto& [group, operations] : worst.traffic) {
    for (const auto& [operation, count] : operations) {
      line("communication " + group, operation + ": " + number(static_cast<double>(count.calls)) + " calls, " +
                                         size(static_cast<double>(count.bytes)) + " per step, " +
                                         size(static_cast<double>(count.wire_bytes)) + " sent by this rank");
    }
  }
  const double forward = worst.forward_flops, backward = worst.backward_flops;
  line("compute", number(static_cast<double>(plan.micro_batches)) + " micro-batches x ((" + number(forward / 1e12) +
                      " + " + number(backward / 1e12) + ") TFLOP / (" + number(hardware.peak_flops / 1e12) + " x " +
                      number(hardware.matmul_efficiency) + " TFLOP/s) + element-wise bytes / (" +
                      number(hardware.memory_bandwidth / 1e9) + " x " + number(hardware.bandwidth_efficiency) +
                      " GB/s)), slowest stage = " + seconds(plan.time.compute));
  auto transfer = [&](const char* name, double value, int64_t span) {
    if (value <= 0) return;
    line(name, std::string("bytes sent / ") + number(bandwidth(hardware, span) / 1e9) + " GB/s" +
                   (span > hardware.gpus_per_node ? " (between nodes)" : " (within a node)") +
                   ", not overlapped = " + seconds(value));
  };
  transfer("tensor parallel", plan.time.tensor, sizes.tensor);
  transfer("context parallel", plan.time.context, sizes.tensor * sizes.context);
  transfer("expert parallel", plan.time.expert, sizes.expert_tensor * sizes.expert);
  transfer("pipeline messages", plan.time.pipeline, sizes.tensor * sizes.context * sizes.data + 1);
  if (sizes.pipeline > 1) {
    line("bubble", "the schedule played with " + std::to_string(sizes.pipeline) + " stages and " +
                       number(static_cast<double>(plan.micro_batches)) + " micro-batches: idle " +
                       number(100 * plan.bubble_fraction) + "% = " + seconds(plan.time.bubble));
  }
  transfer("data parallel", plan.time.data, sizes.tensor * sizes.context * sizes.data);
  line("optimizer step", "bytes moved / memory bandwidth = " + seconds(plan.time.optimizer));
  line("step", seconds(plan.time.step()) + " estimated for " +
                   number(static_cast<double>(request.run.global_batch_size * request.run.sequence_length)) +
                   " tokens, " + number(plan.model_flops / 1e12) + " model TFLOP: " + number(plan.tokens_per_second) +
                   " tokens/s, " + number(100 * plan.mfu) + "% of the peak");
  return lines;
}

}  // namespace mcore_bridge
