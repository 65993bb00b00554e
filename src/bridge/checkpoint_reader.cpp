#include "bridge/checkpoint_reader.h"

#include <ATen/ops/empty.h>

#include <filesystem>
#include <set>

#include "core/strict_json.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace fs = std::filesystem;

CheckpointReader::CheckpointReader(const std::string& path, bool peft_format) {
  std::error_code error;
  if (fs::is_regular_file(path, error)) {
    add(path);
    return;
  }
  if (!fs::is_directory(path, error)) fail<FileNotFoundError>(path, ": no such folder or file");
  const fs::path folder(path);
  const char* single = peft_format ? "adapter_model.safetensors" : "model.safetensors";
  const auto index = folder / "model.safetensors.index.json";
  if (!peft_format && fs::exists(index)) {
    open_index(path, index.string());
  } else if (fs::exists(folder / single)) {
    add((folder / single).string());
  } else {
    std::string hint;
    for (const auto& file : fs::directory_iterator(folder, error)) {
      if (file.path().extension() == ".bin")
        hint = "; it holds .bin files: open it in Transformers and save_pretrained to get safetensors";
    }
    fail<FileNotFoundError>(path, ": holds neither ", peft_format ? "" : "model.safetensors.index.json nor ", single,
                            hint);
  }
}

CheckpointReader::CheckpointReader(const std::string& folder, const Stem& stem) {
  const auto path = fs::path(folder);
  const auto index = path / (stem.name + ".safetensors.index.json"), single = path / (stem.name + ".safetensors");
  if (fs::exists(index)) {
    open_index(folder, index.string());
  } else if (fs::exists(single)) {
    add(single.string());
  } else {
    fail<FileNotFoundError>(folder, ": holds neither ", index.filename().string(), " nor ", single.filename().string());
  }
}

bool CheckpointReader::exists(const std::string& folder, const Stem& stem) {
  std::error_code error;
  const auto path = fs::path(folder);
  return fs::exists(path / (stem.name + ".safetensors.index.json"), error) ||
         fs::exists(path / (stem.name + ".safetensors"), error);
}

void CheckpointReader::open_index(const std::string& folder, const std::string& index) {
  constexpr uint64_t kLongestIndex = 1'000'000'000;
  const InputFile file(index);
  MCB_CHECK(file.size() <= kLongestIndex, index, ": an index of ", file.size(), " bytes is too long");
  std::string text(file.size(), '\0');
  file.read(0, text.data(), text.size());
  const auto weight_map = parse_index(text, index);
  std::set<std::string> shards;
  std::string missing;
  for (const auto& [name, shard] : weight_map) {
    std::error_code error;
    if (shards.insert(shard).second && !fs::exists(fs::path(folder) / shard, error))
      missing += (missing.empty() ? "" : ", ") + shard;
  }
  if (!missing.empty()) fail<FileNotFoundError>(folder, ": shards named in the index are missing: ", missing);
  for (const auto& shard : shards) add((fs::path(folder) / shard).string());
  for (const auto& [name, shard] : weight_map) {
    const auto* tensor = find(name);
    if (!tensor || fs::path(tensor->file->path()).filename() != shard)
      fail<KeyError>(index, ": '", printable(name), "' is not in ", shard, " as the index says");
  }
}

void CheckpointReader::add(const std::string& path) {
  files_.push_back(std::make_unique<SafetensorsFile>(path));
  const auto* file = files_.back().get();
  for (const auto& [name, entry] : file->entries()) {
    MCB_CHECK(tensors_.emplace(name, Tensor{file, &entry}).second, path, ": tensor '", name,
              "' is in another shard too");
  }
}

void CheckpointReader::rename(const std::map<std::string, std::optional<std::string>>& names) {
  if (file_tensors_.empty()) file_tensors_ = tensors_;
  std::map<std::string, Tensor> renamed;
  for (const auto& [name, tensor] : tensors_) {
    const auto found = names.find(name);
    if (found != names.end() && !found->second) continue;
    const auto& target = found == names.end() ? name : *found->second;
    MCB_CHECK(renamed.emplace(target, tensor).second, "converter: two tensors are named '", target, "'");
  }
  for (const auto& [name, target] : names) {
    if (!tensors_.contains(name)) fail<KeyError>("converter: the checkpoint has no tensor '", name, "'");
  }
  tensors_ = std::move(renamed);
}

at::Tensor CheckpointReader::load(const std::string& file_name) const {
  const auto& all = file_tensors_.empty() ? tensors_ : file_tensors_;
  const auto found = all.find(file_name);
  if (found == all.end()) fail<KeyError>("the checkpoint has no tensor '", file_name, "'");
  const auto& [file, entry] = found->second;
  MCB_CHECK(entry->dtype != c10::ScalarType::Undefined, file->path(), ": '", file_name, "' is ", entry->dtype_name,
            ", which torch cannot hold");
  auto tensor = at::empty(entry->shape, at::TensorOptions().dtype(entry->dtype));
  file->input().read(file->offset(*entry), tensor.mutable_data_ptr(), entry->end - entry->begin);
  bytes_loaded_ += entry->end - entry->begin;
  return tensor;
}

const CheckpointReader::Tensor* CheckpointReader::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

}  // namespace mcore_bridge
