#include "bridge/convert.h"

#include <atomic>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "bridge/conversion.h"
#include "bridge/folder_writer.h"
#include "core/thread_pool.h"
#include "families/family.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

using OrderedJson = nlohmann::ordered_json;

const char* config_dtype(c10::ScalarType dtype) {
  return dtype == c10::ScalarType::Float      ? "float32"
         : dtype == c10::ScalarType::BFloat16 ? "bfloat16"
         : dtype == c10::ScalarType::Half     ? "float16"
                                              : nullptr;
}

/// What the model's family keeps in float32 whatever the rest is in; nothing where there is no config.json or none that
/// this engine could train, which a conversion does not ask for.
std::set<std::string> kept_in_float32(const std::string& model) {
  std::set<std::string> names;
  try {
    const auto config = ModelConfig::from_folder(model);
    for (const auto& rule : chunk_weights(config, {.layers = {0, config.num_layers}})) {
      if (rule.float32) names.insert(rule.hf.begin(), rule.hf.end());
    }
  } catch (const std::exception&) {
    names.clear();
  }
  return names;
}

/// How the whole result is quantised: what its tensors are, not what was asked.
QuantMethod result_method(const std::vector<Conversion>& conversions) {
  for (const auto& conversion : conversions) {
    if (conversion.method != QuantMethod::kNone) return conversion.method;
  }
  return QuantMethod::kNone;
}

void erase_quantization(OrderedJson& config) {
  for (const char* key : {"quantization_config", "compression_config"}) config.erase(key);
  for (const char* key : {"text_config", "llm_config", "thinker_config"}) {
    if (config.contains(key) && config[key].is_object()) erase_quantization(config[key]);
  }
}

void set_dtype(OrderedJson& config, const char* name) {
  for (const char* key : {"dtype", "torch_dtype"}) {
    if (config.contains(key) && !config[key].is_null()) config[key] = name;
  }
  for (auto& [key, value] : config.items()) {
    if (value.is_object() && key.ends_with("_config") && key != "quantization_config") set_dtype(value, name);
  }
}

std::string changed_config(const std::string& text, const ConvertOptions& options, const Quantization& found,
                           const std::vector<Conversion>& conversions, bool untie) {
  OrderedJson config;
  try {
    config = OrderedJson::parse(text);
  } catch (const nlohmann::json::exception& error) {
    fail("config.json: not JSON: ", error.what());
  }
  const auto method = result_method(conversions);
  const bool freshly =
      options.quantize != QuantMethod::kNone && (options.dequantize || found.method == QuantMethod::kNone);
  if (method == QuantMethod::kNone || freshly) erase_quantization(config);
  if (method != QuantMethod::kNone && freshly) {
    std::vector<std::string> left;
    for (const auto& conversion : conversions) {
      const auto& from = conversion.from;
      if (conversion.method == QuantMethod::kNone && from.shape.size() >= 2 && from.name.ends_with(".weight"))
        left.push_back(from.name.substr(0, from.name.size() - 7));
    }
    // Through text: the two JSON types differ in the order of keys only.
    config["quantization_config"] = OrderedJson::parse(quantization_config(method, {}, left).dump());
  }
  if (options.dtype && config_dtype(*options.dtype)) set_dtype(config, config_dtype(*options.dtype));
  if (untie) {
    config["tie_word_embeddings"] = false;
    for (const char* key : {"text_config", "llm_config"}) {
      if (config.contains(key) && config[key].is_object()) config[key]["tie_word_embeddings"] = false;
    }
  }
  return config.dump(2) + "\n";
}

/// Whether two tensors hold the same values.
bool equal(const LogicalTensor& a, const LogicalTensor& b) {
  if (a.shape != b.shape) return false;
  std::vector<float> left, right;
  const auto height = std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(1, a.cols));
  for (int64_t row = 0; row < a.rows; row += height) {
    const auto count = std::min(height, a.rows - row);
    a.read(row, count, left);
    b.read(row, count, right);
    if (std::memcmp(left.data(), right.data(), left.size() * sizeof(float)) != 0) return false;
  }
  return true;
}

/// An adapter may train the output layer of a model whose output layer is its embedding: then it needs a tensor of its
/// own, stored like the embedding (which is returned), unless both were trained to the same values.
const LogicalTensor* untied_embedding(const LoraMerge& merge, const std::vector<LogicalTensor>& tensors) {
  const auto head = merge.replaced().find("lm_head.weight");
  if (head == merge.replaced().end()) return nullptr;
  const LogicalTensor* embedding = nullptr;
  for (const auto& tensor : tensors) {
    if (tensor.name == "lm_head.weight") return nullptr;
    if (tensor.name.ends_with("embed_tokens.weight")) embedding = &tensor;
  }
  MCB_CHECK(embedding && embedding->shape == head->second.shape,
            "the adapter's lm_head.weight fits no embedding of the model");
  const auto own = merge.replaced().find(embedding->name);
  const auto& trained = own == merge.replaced().end() ? *embedding : own->second;
  return equal(trained, head->second) ? nullptr : embedding;
}

void check(const ConvertOptions& options, const Quantization& found, const std::vector<Conversion>& conversions) {
  if (options.dtype)
    MCB_CHECK(c10::isFloatingType(*options.dtype) && c10::elementSize(*options.dtype) >= 2,
              "torch_dtype: a 16, 32 or 64 bit floating point type; quantize is what makes fp8");
  if (options.quantize == QuantMethod::kNone) return;
  if (!options.dequantize && found.method != QuantMethod::kNone && found.method != options.quantize) {
    fail("quantize ", quant_name(options.quantize), ": the checkpoint is quantised as ", quant_name(found.method),
         " already; add dequantize to convert it");
  }
  MCB_CHECK(result_method(conversions) == options.quantize, "quantize ", quant_name(options.quantize),
            ": no tensor of the checkpoint is of the kind it applies to",
            options.quantize == QuantMethod::kMxfp4 ? " (stacked experts as gpt-oss has them)" : "");
}

}  // namespace

ConvertReport convert_checkpoint(const ConvertOptions& options) {
  const CheckpointReader reader(options.model, false);
  const auto found = quantization_of(options.model, reader);
  auto tensors = logical_tensors(reader, found);
  std::unique_ptr<LoraMerge> merge;
  bool untie = false;
  if (!options.adapter.empty()) {
    merge = std::make_unique<LoraMerge>(options.adapter, tensors);
    if (const auto* embedding = untied_embedding(*merge, tensors)) {
      untie = true;
      tensors.push_back(LogicalTensor(*embedding));
      tensors.back().name = "lm_head.weight";
    }
  }
  const auto conversions =
      plan_conversions(std::move(tensors), options, found, merge.get(), kept_in_float32(options.model));
  check(options, found, conversions);

  ConvertReport report;
  std::vector<StoredTensor> stored;
  std::vector<ConversionTask> tasks;
  for (const auto& conversion : conversions) {
    for (auto& tensor : conversion.stored()) {
      report.bytes_written += tensor.bytes();
      stored.push_back(std::move(tensor));
      report.copied += conversion.copy ? 1 : 0;
    }
    add_tasks(tasks, conversion);
  }
  report.tensors = static_cast<int64_t>(stored.size());
  FolderWriter target(options.output_dir, stored, options.max_shard_bytes);
  report.files = target.files();
  std::atomic<uint64_t> done = 0;
  run_parallel(
      tasks.size(), io_threads(), [&](size_t index, int) { done += run_task(tasks[index], target.shards()); },
      [&] {
        if (options.progress) options.progress(done, report.bytes_written);
      });
  auto extra_files = options.extra_files;
  for (auto& [name, content] : extra_files) {
    if (name == "config.json") content = changed_config(content, options, found, conversions, untie);
  }
  target.commit(extra_files);
  for (const auto& file : reader.files()) report.bytes_read += file->data_bytes_read();
  return report;
}

}  // namespace mcore_bridge
