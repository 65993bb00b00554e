// What a training run costs before anything is built: memory per rank, communication, bubble, time; and which layouts
// of given GPUs serve it best. Parameters are counted from the modules the engine would build (on the meta device, no
// weights, no processes); times are estimates from a hardware table. docs/planning.md has the formulae.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "mcore_bridge/layouts.h"
#include "mcore_bridge/lora.h"
#include "mcore_bridge/optimizer_options.h"
#include "mcore_bridge/topology.h"

namespace mcore_bridge {

/// Vendors' numbers per GPU; bandwidths in bytes/s and one direction.
struct Hardware {
  std::string name;
  double memory = 0;             ///< bytes
  double peak_flops = 0;         ///< dense bfloat16 FLOP/s
  double memory_bandwidth = 0;   ///< bytes/s
  double link_bandwidth = 0;     ///< to GPUs of the same node
  double network_bandwidth = 0;  ///< to other nodes
  int64_t gpus_per_node = 8;
  double matmul_efficiency = 0.7;      ///< share of peak_flops that matrix products reach
  double bandwidth_efficiency = 0.75;  ///< share of the bandwidths that is reached

  /// Throws ValueError listing the known names.
  static Hardware named(const std::string& name);
  static const std::vector<Hardware>& table();
};

struct PlanRequest {
  ModelConfig config;     ///< finalized; its parallel sizes are the ones asked for
  RunSizes run;           ///< all must be given
  int64_t documents = 1;  ///< documents of a packed row (attention stays inside them)
  std::optional<LoraOptions> lora;
  std::vector<std::string> frozen;  ///< prefixes of parameter names that do not train (as --freeze_parameters)
  OptimizerOptions optimizer;       ///< which, its dtypes, what data-parallel ranks share out
  Hardware hardware;
  double memory = 0;        ///< bytes per GPU; 0: the hardware's
  double reserve = 1.0e9;   ///< bytes that are not the engine's: driver context, communication library
  double margin = 0.03;     ///< share of activations that the caching allocator loses to fragments
  bool gpu_kernels = true;  ///< false: what the CPU's kernels keep
};

/// Bytes on one rank at the step's peak.
struct MemoryEstimate {
  int64_t weights = 0;
  int64_t gradients = 0;      ///< fp32 buckets
  int64_t optimizer = 0;      ///< masters and moments
  int64_t activations = 0;    ///< kept for backward by all micro-batches in flight
  int64_t workspace = 0;      ///< temporaries at the worst moment
  int64_t communication = 0;  ///< buffers of collectives beyond those
  int64_t reserve = 0;        ///< not the engine's, and fragmentation
  int64_t offloaded = 0;      ///< host memory that activations wait in (cpu_offloading), not in the total
  int64_t total() const { return weights + gradients + optimizer + activations + workspace + communication + reserve; }
};

/// Communication of one rank per step: group kind ("tp", "pp", "dp-cp", ...) -> operation -> count, as
/// communication_volume() counts it.
struct TrafficLine {
  int64_t calls = 0, bytes = 0, wire_bytes = 0;
};
using StepTraffic = std::map<std::string, std::map<std::string, TrafficLine>>;

struct StageEstimate {
  int stage = 0;
  LayerRange layers;  ///< of its first chunk
  int64_t parameters = 0, trainable = 0;
  int in_flight = 1;  ///< micro-batches whose activations live at once
  MemoryEstimate memory;
  StepTraffic traffic;
  double forward_flops = 0, backward_flops = 0;  ///< per micro-batch
};

/// Seconds of one step.
struct TimeEstimate {
  double compute = 0;    ///< matrix products and element-wise passes of the slowest stage
  double tensor = 0;     ///< tensor- and sequence-parallel collectives
  double context = 0;    ///< context-parallel exchanges
  double expert = 0;     ///< tokens to their experts and back
  double pipeline = 0;   ///< activations between stages
  double bubble = 0;     ///< idle share of the schedule, as time
  double data = 0;       ///< gradients (and parameters) over data-parallel ranks
  double optimizer = 0;  ///< the update's memory traffic
  double step() const { return compute + tensor + context + expert + pipeline + bubble + data + optimizer; }
};

struct Plan {
  Layout layout;
  bool sequence_parallel = false;
  std::string recompute = "none";
  int64_t micro_batches = 0;  ///< per step and data-parallel rank
  std::vector<StageEstimate> stages;
  int worst = 0;  ///< stage with the most memory
  double bubble_fraction = 0;
  TimeEstimate time;
  double tokens_per_second = 0, model_flops = 0;  ///< of all GPUs; FLOPs of a step without recomputation
  double mfu = 0;                                 ///< share of the hardware's peak
  bool fits = false;
  /// Formulae with the numbers filled in: (quantity, formula = value).
  std::vector<std::pair<std::string, std::string>> explanation;

  const StageEstimate& worst_stage() const { return stages[static_cast<size_t>(worst)]; }
};

/// The plan of the layout in request.config. Throws ValueError as check_layout does.
Plan plan_layout(const PlanRequest& request);

/// Sizes of a search that are fixed; the others are tried.
struct Fixed {
  bool tensor = false, pipeline = false, virtual_pipeline = false, context = false, expert = false,
       sequence_parallel = false, micro_batch = false, recompute = false;
};
/// Every possible layout's plan: those that fit first, fastest first; then the others, smallest first. At most `count`.
std::vector<Plan> search_layouts(const PlanRequest& request, const Fixed& fixed, int count);

/// The plan nearest to what the request asks for that fits into memory: first its layout with recomputation or smaller
/// micro-batches, then other layouts by distance. None when nothing fits.
std::optional<Plan> nearest_fitting(const PlanRequest& request);

Json to_json(const Plan& plan);

}  // namespace mcore_bridge
