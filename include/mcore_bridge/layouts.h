// Which layouts a model can take: all of them, the nearest to one that it cannot, and the refusal that names it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

/// What a run asks of its processes besides the parallel sizes in ModelConfig. 0: not known, not checked.
struct RunSizes {
  int64_t processes = 0;
  int64_t micro_batch_size = 0;   ///< rows per forward and data-parallel rank
  int64_t global_batch_size = 0;  ///< rows per step over all data-parallel ranks
  int64_t sequence_length = 0;    ///< positions of a row, padding included
  bool operator==(const RunSizes&) const = default;
};

struct Layout {
  int64_t tensor = 1, pipeline = 1, virtual_pipeline = 1, context = 1, expert = 1;
  bool account = false;  ///< embedding and loss count as layers of the pipeline split
  RunSizes run;

  int64_t model_ranks() const { return tensor * pipeline * context; }
  /// Data-parallel ranks; 0 when the number of processes is not known.
  int64_t data() const { return run.processes / model_ranks(); }
  bool operator==(const Layout&) const = default;
};

Layout layout_of(const ModelConfig& config, const RunSizes& run = {});
/// `config` with the sizes of `layout`; not finalized.
ModelConfig with_layout(ModelConfig config, const Layout& layout);

/// Throws ValueError, on every rank with the same text, when `config` (finalized or not) cannot be split as its
/// parallel sizes say or the run's sizes do not fit them; the text ends with the nearest layout that can. Reads and
/// builds nothing.
void check_layout(const ModelConfig& config, const RunSizes& run = {});

/// Every layout of the model on run.processes (which must be given), smallest first.
std::vector<Layout> possible_layouts(const ModelConfig& config, const RunSizes& run);

/// Up to `count` layouts that work, nearest to what is asked first. Distance is the sum of |log2(size / size asked)|
/// over all sizes; without a number of processes any number is possible.
std::vector<Layout> nearest_layouts(const ModelConfig& config, const RunSizes& run = {}, int count = 1);

/// The sizes in which `layout` differs from `asked`: "tensor_model_parallel_size 4, global_batch_size 24".
std::string layout_changes(const Layout& layout, const Layout& asked);

}  // namespace mcore_bridge
