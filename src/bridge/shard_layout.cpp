#include "bridge/shard_layout.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "bridge/safetensors_file.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {

uint64_t StoredTensor::bytes() const {
  uint64_t count = c10::elementSize(dtype);
  for (const auto size : shape) count *= static_cast<uint64_t>(size);
  return count;
}

ShardLayout shard_layout(const std::vector<StoredTensor>& tensors, int64_t max_shard_bytes, const std::string& stem) {
  MCB_CHECK(max_shard_bytes > 0, "max_shard_size: must be positive");
  MCB_CHECK(!tensors.empty(), "save_weights: there is nothing to save");

  std::vector<std::vector<const StoredTensor*>> shards(1);
  uint64_t filled = 0, total = 0;
  for (const auto& tensor : tensors) {
    const auto bytes = tensor.bytes();
    if (stem != "adapter_model" && !shards.back().empty() && filled + bytes > static_cast<uint64_t>(max_shard_bytes)) {
      shards.emplace_back();
      filled = 0;
    }
    shards.back().push_back(&tensor);
    filled += bytes;
    total += bytes;
  }

  ShardLayout layout;
  nlohmann::json weight_map = nlohmann::json::object();
  for (size_t i = 0; i < shards.size(); ++i) {
    ShardFile file;
    if (shards.size() == 1) {
      file.name = stem + ".safetensors";
    } else {
      char name[64];
      std::snprintf(name, sizeof(name), "-%05zu-of-%05zu.safetensors", i + 1, shards.size());
      file.name = stem + name;
    }
    // Wide elements first, so that every tensor is aligned to its own whatever is mixed.
    std::stable_sort(shards[i].begin(), shards[i].end(), [](const auto* a, const auto* b) {
      return c10::elementSize(a->dtype) > c10::elementSize(b->dtype);
    });
    std::string text = R"({"__metadata__":{"format":"pt"})";  // joined by hand: in file order, in linear time
    uint64_t at = 0;
    for (const auto* tensor : shards[i]) {
      const auto bytes = tensor->bytes();
      text += "," + nlohmann::json(tensor->name).dump() + R"(:{"dtype":")" + safetensors_dtype(tensor->dtype) +
              R"(","shape":)" + nlohmann::json(tensor->shape).dump() + R"(,"data_offsets":[)" + std::to_string(at) +
              "," + std::to_string(at + bytes) + "]}";
      const bool fresh = layout.places.emplace(tensor->name, ShardLayout::Place{static_cast<int>(i), at, bytes}).second;
      MCB_CHECK(fresh, "save_weights: two tensors are named '", tensor->name, "'");
      weight_map[tensor->name] = file.name;
      at += bytes;
    }
    text += '}';
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
        nlohmann::json({{"metadata", {{"total_size", total}}}, {"weight_map", std::move(weight_map)}}).dump(2) + "\n";
  }
  return layout;
}

}  // namespace mcore_bridge
