#include "bridge/inspect.h"

#include <filesystem>

#include "bridge/checkpoint_reader.h"

namespace mcore_bridge {

Json inspect_checkpoint(const std::string& path) {
  namespace fs = std::filesystem;
  auto has = [&](const char* name) { return fs::exists(fs::path(path) / name); };
  const bool adapter =
      has("adapter_model.safetensors") && !has("model.safetensors") && !has("model.safetensors.index.json");
  const CheckpointReader reader(path, adapter);
  Json files = Json::array(), tensors = Json::array();
  uint64_t total = 0;
  for (const auto& file : reader.files()) {
    const auto name = fs::path(file->path()).filename().string();
    files.push_back({{"name", name}, {"bytes", fs::file_size(file->path())}});
    for (const auto& [tensor, entry] : file->entries()) {
      const auto bytes = entry.end - entry.begin;
      tensors.push_back(
          {{"name", tensor}, {"dtype", entry.dtype_name}, {"shape", entry.shape}, {"bytes", bytes}, {"file", name}});
      total += bytes;
    }
  }
  return {{"format", adapter ? "adapter" : "model"}, {"files", files}, {"tensors", tensors}, {"total_bytes", total}};
}

}  // namespace mcore_bridge
