// Between Hugging Face / PEFT files and the parameters of this rank.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "mcore_bridge/model.h"

namespace mcore_bridge {

struct LoadReport {
  int64_t bytes_read = 0;                        ///< bytes of the file slices this rank copied
  int64_t bytes_needed = 0;                      ///< bytes of this rank's slices by the plan; equal to bytes_read
  std::vector<std::string> missing, unexpected;  ///< Hugging Face names (only with strict = false)
};

struct LoadOptions {
  bool peft_format = false;  ///< adapter_model.safetensors with PEFT names
  std::string adapter_name = "default";
  bool strict = true;  ///< missing or mis-shaped tensors are one KeyError that lists them all; tensors the model has no
                       ///< use for are reported
};

struct SaveOptions {
  bool peft_format = false;
  std::string adapter_name = "default";
  bool merge_lora = false;  ///< write W + scaling * B A; the parameters in memory do not change
  int64_t max_shard_bytes = 5'000'000'000;
  /// Written as they are beside the weights, in the same atomic step: (file name, content).
  std::vector<std::pair<std::string, std::string>> extra_files;
};

/// All chunks of this rank (one per virtual stage), in order.
using Chunks = std::vector<std::shared_ptr<GPTModel>>;

/// Reads this rank's slices only; no communication but the final "did everybody succeed".
LoadReport load_weights(const Chunks& chunks, const std::string& folder, const LoadOptions& options = {});

/// Collective: every rank calls it, each writes its own part of the same files. `folder` appears whole or stays as it
/// was.
void save_weights(const Chunks& chunks, const std::string& folder, const SaveOptions& options = {});

/// Collective stream of whole tensors in Hugging Face names. Every rank iterates to the end.
class WeightExporter {
 public:
  WeightExporter(Chunks chunks, SaveOptions options, int64_t bucket_bytes = 256 << 20);
  ~WeightExporter();
  /// False at the end. `tensor` lives on the parameters' device.
  bool next(std::string& name, at::Tensor& tensor);
  int64_t count() const;  ///< number of tensors in all

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Random initialisation that depends on (seed, name, index) alone, so every layout starts from the same weights.
void initialize(const Chunks& chunks, uint64_t seed);

/// Adds an adapter to the matching linear layers of every chunk and freezes the rest. Collective-free.
void add_lora(const Chunks& chunks, const LoraOptions& options, const std::string& adapter_name = "default");

}  // namespace mcore_bridge
