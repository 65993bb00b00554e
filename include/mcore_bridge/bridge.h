// Between Hugging Face / PEFT files and the parameters of this rank.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "mcore_bridge/model.h"

namespace mcore_bridge {

struct LoadReport {
  int64_t bytes_read = 0;                        ///< bytes of data this rank read from the files, as counted there
  int64_t bytes_needed = 0;                      ///< bytes of this rank's slices by the plan; equal to bytes_read
  std::vector<std::string> missing, unexpected;  ///< Hugging Face names (only with strict = false)
};

class CheckpointReader;

/// What a converter makes of a checkpoint: names in the files -> names of the model (none: dropped), and tensors whose
/// values it changes. A changed tensor is made when it is needed, once, whole, by any thread, and freed after use.
struct Conversion {
  std::map<std::string, std::optional<std::string>> names;
  struct Changed {
    std::vector<int64_t> shape;
    c10::ScalarType dtype;
    std::function<at::Tensor()> value;
  };
  std::map<std::string, Changed> changed;  ///< by the model's name; their names in the files are dropped in `names`
};

/// Called on this thread about every 100 ms and at the end. An exception stops the work and leaves through it.
using Progress = std::function<void(int64_t done_bytes, int64_t total_bytes)>;

struct LoadOptions {
  bool peft_format = false;  ///< adapter_model.safetensors with PEFT names
  std::string adapter_name = "default";
  /// Missing tensors, and unexpected ones that belong to a layer the model has (a bias it would leave out), are errors.
  /// Tensors that do not fit always are. One error lists all. Unexpected tensors of other modules are only reported.
  bool strict = true;
  std::function<Conversion(const CheckpointReader&)> convert = {};
  Progress progress = {};
};

/// What a converter makes of a tensor on its way out.
struct SavedTensor {
  std::string name;
  /// Empty: the value stays as it is. Otherwise the whole tensor passes through it on rank 0, on the CPU.
  std::function<at::Tensor(const at::Tensor&)> value;
  std::vector<int64_t> shape;                          ///< of the changed value
  c10::ScalarType dtype = c10::ScalarType::Undefined;  ///< of the changed value
};

struct SaveOptions {
  bool peft_format = false;
  std::string adapter_name = "default";
  bool merge_lora = false;  ///< write W + scaling * B A; the parameters in memory do not change
  int64_t max_shard_bytes = 5'000'000'000;
  /// (name, shape, dtype) of a tensor -> how it is saved, or nothing to leave it out. Must answer alike on all ranks.
  std::function<std::optional<SavedTensor>(const std::string&, const std::vector<int64_t>&, c10::ScalarType)> convert =
      {};
  /// "fp8": linear layers' weights in blocks of 128 x 128 with `_scale_inv`; empty: params_dtype.
  std::string quantization;
  Progress progress = {};  ///< of this rank's writes
  /// Written as they are beside the weights, in the same atomic step: (file name, content).
  std::vector<std::pair<std::string, std::string>> extra_files;
};

/// All chunks of this rank (one per virtual stage), in order.
using Chunks = std::vector<std::shared_ptr<GPTModel>>;

/// Reads this rank's slices only, each byte once, with io_threads() threads (MCB_IO_THREADS) straight into the
/// parameters; host memory beyond them is a few MiB per thread whatever the model's size. No communication but the
/// final "did everybody succeed".
LoadReport load_weights(const Chunks& chunks, const std::string& folder, const LoadOptions& options = {});

/// Collective: every rank calls it, each writes its own part of the same files. `folder` appears whole or stays as it
/// was.
void save_weights(const Chunks& chunks, const std::string& folder, const SaveOptions& options = {});

struct ExportOptions {
  bool peft_format = false;
  std::string adapter_name = "default";
  bool merge_lora = false;
  bool only_master = false;  ///< rank 0 alone gets tensors; the others send what they own and hold nothing whole
  int64_t bucket_bytes = 128 << 20;  ///< tensors travel together until they are this many bytes
  std::set<std::string> names = {};  ///< only these; empty: all
  std::string quantization = {};     ///< as SaveOptions::quantization; weights travel as values and become codes here
};

/// Collective stream of whole tensors in Hugging Face names. Every rank iterates to the end. Owners send each byte once
/// (broadcast, or to rank 0 with only_master); the next bucket is on its way while the caller uses the current one. A
/// rank holds two buckets of tensors at most, beside those the caller keeps.
class WeightExporter {
 public:
  explicit WeightExporter(Chunks chunks, ExportOptions options = {});  ///< collective
  ~WeightExporter();
  /// False at the end (with only_master on the other ranks at once, after all their sends). `tensor` lives on the
  /// parameters' device and stays valid.
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
