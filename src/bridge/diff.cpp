#include "bridge/diff.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>

#include "bridge/logical_tensors.h"
#include "core/thread_pool.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

constexpr int64_t kTaskElements = 1 << 20;

struct Side {
  Side(const std::string& path, bool dequantize)
      : adapter(is_adapter(path)),
        reader(path, adapter),
        quantization(dequantize ? quantization_of(path, reader) : Quantization{}) {
    for (auto& tensor : logical_tensors(reader, quantization, dequantize)) {
      order.push_back(tensor.name);
      tensors.emplace(tensor.name, std::move(tensor));
    }
  }
  static bool is_adapter(const std::string& path) {
    const std::filesystem::path folder(path);
    auto has = [&](const char* name) { return std::filesystem::exists(folder / name); };
    return has("adapter_model.safetensors") && !has("model.safetensors") && !has("model.safetensors.index.json");
  }
  bool adapter;
  CheckpointReader reader;
  Quantization quantization;
  std::map<std::string, LogicalTensor> tensors;
  std::vector<std::string> order;
};

struct Pair {
  const LogicalTensor *a, *b;
  bool identical = true, infinite = false;
  double max_abs = 0, square = 0, square_a = 0;
};

struct Task {
  size_t pair;
  int64_t first, count;
};

void compare_bytes(Pair& pair, std::mutex& mutex) {
  bool same = true;
  for (size_t part = 0; part < pair.a->parts.size() && same; ++part) {
    const auto &a = *pair.a->parts[part], &b = *pair.b->parts[part];
    const auto bytes = a.entry->end - a.entry->begin;
    same = a.entry->dtype == b.entry->dtype && bytes == b.entry->end - b.entry->begin;
    std::vector<std::byte> left, right;
    for (uint64_t at = 0; at < bytes && same; at += 4 << 20) {
      const auto count = std::min<uint64_t>(4 << 20, bytes - at);
      left.resize(count);
      right.resize(count);
      a.file->input().read(a.file->offset(*a.entry) + at, left.data(), count);
      b.file->input().read(b.file->offset(*b.entry) + at, right.data(), count);
      same = std::memcmp(left.data(), right.data(), count) == 0;
    }
  }
  const std::scoped_lock lock(mutex);
  pair.identical = pair.identical && same;
}

void compare_values(Pair& pair, const Task& task, std::mutex& mutex) {
  std::vector<float> a, b;
  pair.a->read(task.first, task.count, a);
  pair.b->read(task.first, task.count, b);
  const bool identical = std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  double max_abs = 0, square = 0, square_a = 0;
  bool infinite = false;
  for (size_t i = 0; i < a.size(); ++i) {
    const double left = a[i], right = b[i];
    if (!std::isfinite(left) || !std::isfinite(right)) {
      const bool same = std::memcmp(&a[i], &b[i], sizeof(float)) == 0 || (std::isnan(left) && std::isnan(right));
      infinite = infinite || !same;
      continue;
    }
    const auto difference = std::fabs(left - right);
    max_abs = std::max(max_abs, difference);
    square += difference * difference;
    square_a += left * left;
  }
  const std::scoped_lock lock(mutex);
  pair.identical = pair.identical && identical;
  pair.infinite = pair.infinite || infinite;
  pair.max_abs = std::max(pair.max_abs, max_abs);
  pair.square += square;
  pair.square_a += square_a;
}

std::string dtype_of(const LogicalTensor& tensor) {
  return tensor.method == QuantMethod::kMxfp4 ? "MXFP4" : tensor.parts[0]->entry->dtype_name;
}

}  // namespace

Json diff_checkpoints(const std::string& a, const std::string& b, const DiffOptions& options) {
  const Side left(a, options.dequantize), right(b, options.dequantize);
  Json missing = Json::array(), extra = Json::array(), wrong = Json::array();
  std::vector<Pair> pairs;
  uint64_t total = 0;
  for (const auto& name : left.order) {
    const auto& mine = left.tensors.at(name);
    const auto found = right.tensors.find(name);
    if (found == right.tensors.end()) {
      missing.push_back(name);
    } else if (mine.shape != found->second.shape) {
      wrong.push_back({{"name", name}, {"a", mine.shape}, {"b", found->second.shape}});
    } else {
      pairs.push_back({&mine, &found->second});
      total += mine.bytes() + found->second.bytes();
    }
  }
  for (const auto& name : right.order) {
    if (!left.tensors.contains(name)) extra.push_back(name);
  }

  std::vector<Task> tasks;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const auto &mine = *pairs[i].a, &other = *pairs[i].b;
    if (!mine.source || !other.source) {
      tasks.push_back({i, 0, mine.rows});
      continue;
    }
    const auto unit = std::max(mine.source->row_block(), other.source->row_block());
    const auto height = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, mine.cols) / unit) * unit;
    for (int64_t row = 0; row < mine.rows; row += height) tasks.push_back({i, row, std::min(height, mine.rows - row)});
  }
  std::vector<std::mutex> mutexes(pairs.size());
  std::atomic<uint64_t> done = 0;
  run_parallel(
      tasks.size(), io_threads(),
      [&](size_t index, int) {
        const auto& task = tasks[index];
        auto& pair = pairs[task.pair];
        const bool values = pair.a->source && pair.b->source;
        values ? compare_values(pair, task, mutexes[task.pair]) : compare_bytes(pair, mutexes[task.pair]);
        const auto bytes = pair.a->bytes() + pair.b->bytes();
        done += pair.a->rows == 0 ? 0 : bytes * static_cast<uint64_t>(task.count) / static_cast<uint64_t>(pair.a->rows);
      },
      [&] {
        if (options.progress) options.progress(done, total);
      });

  Json rows = Json::array();
  for (const auto& pair : pairs) {
    Json row = {{"name", pair.a->name},
                {"shape", pair.a->shape},
                {"dtype_a", dtype_of(*pair.a)},
                {"dtype_b", dtype_of(*pair.b)},
                {"identical", pair.identical}};
    const bool values = pair.a->source && pair.b->source;
    if (values) {
      const auto relative = pair.square == 0 ? 0.0 : std::sqrt(pair.square / pair.square_a);  // infinite beside zeros
      row["max_abs"] = pair.infinite ? Json(nullptr) : Json(pair.max_abs);
      row["relative"] = pair.infinite || !std::isfinite(relative) ? Json(nullptr) : Json(relative);
    }
    rows.push_back(std::move(row));
  }
  return {{"tensors", rows}, {"missing", missing}, {"extra", extra}, {"wrong_shape", wrong}};
}

}  // namespace mcore_bridge
