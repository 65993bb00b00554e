#include "planner/memory.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <iterator>

namespace mcore_bridge {
namespace {

/// Bytes of one chunk's micro-batch: kept by forward, most beyond that in backward, waiting for the weights' gradients.
struct ChunkMemory {
  int64_t saved = 0, temporary = 0, deferred = 0;
  int64_t offloaded = 0;        ///< in host memory meanwhile; not in `saved` unless that is the host's memory too
  int64_t split_temporary = 0;  ///< `temporary` when the weights' gradients are put aside
  int64_t matrices = 0;         ///< those gradients, once they are made, where they are
};

/// `number`: of the chunk on its stage. `gpu`: host memory is another than the one that is counted.
ChunkMemory memory_of(const PlannedChunk& chunk, int number, const PlannedBuffers& buffers, bool gpu) {
  ChunkMemory result;
  for (const auto& segment : chunk.segments) {
    result.saved += segment.footprint.saved - (gpu ? segment.footprint.offloaded : 0);
    result.offloaded += segment.footprint.offloaded;
  }
  int64_t alive = 0;  // beyond `saved`
  auto unit = static_cast<int>(chunk.place.layers.count) + (chunk.place.post_process ? 1 : 0);
  for (auto segment = chunk.segments.rbegin(); segment != chunk.segments.rend(); ++segment) {
    const auto& footprint = segment->footprint;
    // Offloaded layers are back when their backward begins, those before them on their way. The CPU's copies are there
    // twice until then.
    const auto back = gpu ? footprint.offloaded : 0;
    const auto before = std::next(segment);
    const auto coming = footprint.offloaded > 0 && before != chunk.segments.rend() ? before->footprint.offloaded : 0;
    int64_t passing = 0;
    const bool head = chunk.place.post_process && segment == chunk.segments.rbegin();
    for (auto units = std::max<int64_t>(1, segment->layers); units > 0; --units, --unit)
      passing = std::max(passing, buffers.passing(number, unit, head, !gpu));
    const auto most = std::max(back + coming + footprint.workspace, footprint.offloaded) + passing;
    result.temporary = std::max(result.temporary, alive + most);
    result.split_temporary = std::max(result.split_temporary, alive + result.deferred + most);
    result.deferred += footprint.deferred;
    alive -= footprint.saved - back;
  }
  for (const auto& parameter : chunk.parameters) {
    // Where there are main gradients those of layers that are not experts go straight there.
    const bool made = buffers.sharding >= Sharding::kGradients || parameter.traits.expert;
    if (made && parameter.trainable && parameter.tensor.dim() > 1 && !parameter.traits.vocabulary)
      result.matrices += static_cast<int64_t>(parameter.tensor.nbytes());
  }
  return result;
}

struct Peak {
  int64_t kept = 0, all = 0, offloaded = 0;
};

/// Goes through the stage's computations.
Peak play(const StageSchedule& row, const std::vector<ChunkMemory>& chunks) {
  Peak peak;
  int64_t alive = 0, away = 0;
  for (const auto& action : row) {
    const auto& chunk = chunks.at(static_cast<size_t>(action.chunk));
    switch (action.kind) {
      case Action::Kind::kForward:
        alive += chunk.saved;
        away += chunk.offloaded;
        break;
      case Action::Kind::kBackward:
      case Action::Kind::kBackwardInput: {
        const bool split = action.kind == Action::Kind::kBackwardInput;
        peak.all = std::max(peak.all, alive + (split ? chunk.split_temporary : chunk.temporary));
        alive += (split ? chunk.deferred : 0) - chunk.saved;
        away -= chunk.offloaded;
        break;
      }
      case Action::Kind::kBackwardWeight:
        peak.all = std::max(peak.all, alive - chunk.deferred + chunk.matrices);
        alive -= chunk.deferred;
        break;
      default:
        break;
    }
    peak.kept = std::max(peak.kept, alive);
    peak.offloaded = std::max(peak.offloaded, away);
  }
  peak.all = std::max(peak.kept, peak.all);
  return peak;
}

}  // namespace

MemoryEstimate estimate_memory(const PlannedStage& stage, const PlanRequest& request, const ParallelSizes& sizes,
                               const StageSchedule& row) {
  MemoryEstimate result;
  const auto& buffers = stage.buffers;
  std::vector<ChunkMemory> chunks;
  for (const auto& chunk : stage.chunks)
    chunks.push_back(memory_of(chunk, static_cast<int>(chunks.size()), buffers, request.gpu_kernels));
  const auto peak = play(row, chunks);
  result.weights = buffers.weights;
  result.gradients = buffers.gradients;
  result.optimizer = buffers.optimizer;
  result.activations = peak.kept;
  result.offloaded = peak.offloaded;
  // Messages: where a stage follows, the gradient at work and what comes or goes beside it; where one comes before, the
  // next input.
  const int64_t follows = stage.chunks.back().place.post_process ? 0 : 1,
                before = stage.chunks.front().place.pre_process ? 0 : 1;
  const auto boundary = sizes.pipeline > 1 ? stage.boundary : 0;
  result.workspace = peak.all - peak.kept + (2 * follows + before) * boundary;
  // When no activation lives any more: tied embeddings are summed over first and last stage in a copy; Gloo copies what
  // it shares out. Gradients of units, and with overlap all buckets but the last, go while activations live.
  const auto copied = request.gpu_kernels ? 0 : buffers.copied;
  int64_t living = 0;
  const bool by_units = buffers.sharding >= Sharding::kGradients;  // counted with their units
  if (!by_units && request.optimizer.overlap_grad_reduce && !buffers.buckets.empty()) {
    const auto count = static_cast<int64_t>(buffers.buckets.size());
    living = (result.activations + result.workspace) * (count - 1) / count;
  }
  const auto alone = std::max(buffers.grad_element * buffers.tied, copied) + living;
  result.communication = std::max<int64_t>(0, alone - result.activations - result.workspace);
  result.reserve = static_cast<int64_t>(request.reserve +
                                        request.margin * static_cast<double>(result.activations + result.workspace));
  return result;
}

}  // namespace mcore_bridge
