// A checkpoint of one or several safetensors files, by tensor name.
#pragma once

#include <map>
#include <memory>
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

 private:
  void open_index(const std::string& folder, const std::string& index);
  void add(const std::string& path);
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace mcore_bridge
