#include "bridge/shard_layout.h"

#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "bridge/safetensors_file.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {

ShardLayout shard_layout(const std::vector<HfTensor>& tensors, c10::ScalarType dtype, int64_t max_shard_bytes,
                         const std::string& stem) {
  MCB_CHECK(max_shard_bytes > 0, "max_shard_size: must be positive");
  MCB_CHECK(!tensors.empty(), "save_weights: there is nothing to save");
  const auto element = static_cast<uint64_t>(c10::elementSize(dtype));
  auto bytes_of = [&](const HfTensor& tensor) { return static_cast<uint64_t>(tensor.rows * tensor.cols) * element; };

  std::vector<std::vector<const HfTensor*>> shards(1);
  uint64_t filled = 0, total = 0;
  for (const auto& tensor : tensors) {
    const auto bytes = bytes_of(tensor);
    if (stem == "model" && !shards.back().empty() && filled + bytes > static_cast<uint64_t>(max_shard_bytes)) {
      shards.emplace_back();
      filled = 0;
    }
    shards.back().push_back(&tensor);
    filled += bytes;
    total += bytes;
  }

  ShardLayout layout;
  nlohmann::ordered_json weight_map = nlohmann::ordered_json::object();
  for (size_t i = 0; i < shards.size(); ++i) {
    ShardFile file;
    if (shards.size() == 1) {
      file.name = stem + ".safetensors";
    } else {
      char name[64];
      std::snprintf(name, sizeof(name), "model-%05zu-of-%05zu.safetensors", i + 1, shards.size());
      file.name = name;
    }
    nlohmann::ordered_json header = {{"__metadata__", {{"format", "pt"}}}};
    uint64_t at = 0;
    for (const auto* tensor : shards[i]) {
      const auto end = at + bytes_of(*tensor);
      header[tensor->name] = {
          {"dtype", safetensors_dtype(dtype)}, {"shape", tensor->sizes()}, {"data_offsets", {at, end}}};
      layout.places[tensor->name] = {static_cast<int>(i), at};
      weight_map[tensor->name] = file.name;
      at = end;
    }
    auto text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the data is aligned
    const uint64_t length = text.size();
    file.header.resize(8);
    std::memcpy(file.header.data(), &length, 8);
    file.header += text;
    file.bytes = file.header.size() + at;
    for (const auto* tensor : shards[i]) layout.places[tensor->name].offset += file.header.size();
    layout.files.push_back(std::move(file));
  }
  if (shards.size() > 1) {
    layout.index =
        nlohmann::ordered_json({{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}}).dump(2) + "\n";
  }
  return layout;
}

}  // namespace mcore_bridge
