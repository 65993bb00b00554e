// Training checkpoints: a Hugging Face folder (or PEFT adapter) that also holds, in training_state/, the optimizer's
// fp32 masters and moments as safetensors with the names and shapes of the weights they belong to, and state.json. Any
// layout reads what any other wrote.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "mcore_bridge/trainer.h"

namespace mcore_bridge {

class Group;

struct CheckpointOptions {
  bool peft_format = false;  ///< the adapter instead of the model
  std::string adapter_name = "default";
  int64_t max_shard_bytes = 5'000'000'000;
  bool weights = true;    ///< write the weights
  bool optimizer = true;  ///< write masters and moments
};

struct CheckpointReport {
  int64_t bytes = 0;   ///< of all files of the checkpoint
  double seconds = 0;  ///< of write()
};

/// Writes one checkpoint after the other. What goes where is planned once.
class CheckpointWriter {
 public:
  /// Collective over all ranks. ValueError names trained parameters that the checkpoint would not hold.
  CheckpointWriter(Trainer& trainer, const CheckpointOptions& options);
  ~CheckpointWriter();

  /// Copies everything this rank will write to host memory (pinned on a GPU; kept for the next time). Training may go
  /// on as soon as it returns. Without it write() reads the live tensors.
  void snapshot();

  /// Files beside the tensors; only the first rank's are used.
  struct Content {
    std::vector<std::pair<std::string, std::string>> files;  ///< (name, content); "training_state/x.json" is allowed
    std::string
        state;  ///< JSON object for training_state/state.json; "files" (bytes and crc32c of every file) is added
  };
  /// `folder` appears whole, or stays as it was and every rank throws. Collective over `group`, which must hold all
  /// ranks and be used by nobody else meanwhile; any thread. Drops the snapshot.
  CheckpointReport write(const std::string& folder, const Content& content, const Group& group);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Fills the optimizer of `trainer` (and, when these are fp32, nothing but the moments) from a folder that
/// CheckpointWriter wrote on any layout; the weights must be loaded already. Collective over all ranks. KeyError lists
/// what is missing.
void load_optimizer_state(Trainer& trainer, const std::string& folder, const CheckpointOptions& options);

/// A file of a checkpoint as state.json lists it.
struct FileRecord {
  std::string name;
  int64_t bytes = 0;
  int64_t crc32c = 0;
};
/// What is wrong with the files of `folder`, one line each; the reading is shared by the ranks of `group`. Collective;
/// all ranks get the same.
std::vector<std::string> damaged_files(const std::string& folder, const std::vector<FileRecord>& files,
                                       const Group& group);

}  // namespace mcore_bridge
