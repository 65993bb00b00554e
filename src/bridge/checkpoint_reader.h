// A checkpoint of one or several safetensors files, by tensor name.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bridge/safetensors_file.h"

namespace mcore_bridge {

class CheckpointReader {
 public:
  /// `path`: a safetensors file, or a folder with model.safetensors.index.json, model.safetensors or (peft_format)
  /// adapter_model.safetensors. FileNotFoundError lists what is missing.
  CheckpointReader(const std::string& path, bool peft_format);
  /// The files of another stem than "model": <stem>.safetensors or <stem>.safetensors.index.json and its shards.
  struct Stem {
    std::string name;
  };
  CheckpointReader(const std::string& folder, const Stem& stem);
  /// Whether `folder` has files of that stem.
  static bool exists(const std::string& folder, const Stem& stem);

  struct Tensor {
    const SafetensorsFile* file;
    const SafetensorsEntry* entry;
  };
  /// Null when there is no such tensor.
  const Tensor* find(const std::string& name) const;
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  const std::vector<std::unique_ptr<SafetensorsFile>>& files() const { return files_; }

  /// Names as a converter wants them: a tensor under its new name, or dropped when that is empty (optional without a
  /// value). What is not named stays. KeyError for an unknown name, ValueError when two tensors get one name.
  void rename(const std::map<std::string, std::optional<std::string>>& names);
  /// A whole tensor on the CPU, by its name in the file. KeyError when there is none.
  at::Tensor load(const std::string& file_name) const;
  /// Bytes that load() has read so far.
  uint64_t bytes_loaded() const { return bytes_loaded_; }

 private:
  void open_index(const std::string& folder, const std::string& index);
  void add(const std::string& path);
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, Tensor> tensors_;       // by the name the model knows
  std::map<std::string, Tensor> file_tensors_;  // by the name in the files, once they differ
  mutable std::atomic<uint64_t> bytes_loaded_ = 0;
};

}  // namespace mcore_bridge
