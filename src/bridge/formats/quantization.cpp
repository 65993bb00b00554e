#include "bridge/formats/quantization.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

constexpr const char* kDequantize = "use the model's bfloat16 checkpoint";
constexpr const char* kOtherFp8 = "use the bfloat16 checkpoint, or the model's blockwise FP8 one";

struct Ending {
  const char* ending;
  const char* what;
  const char* advice;
};

/// Tensors that betray a method when config.json is silent.
constexpr Ending kEndings[] = {
    {".qzeros", "GPTQ or AWQ (packed integers)", kDequantize},
    {".qweight", "GPTQ or AWQ (packed integers)", kDequantize},
    {".g_idx", "GPTQ (packed integers)", kDequantize},
    {".weight_packed", "compressed-tensors", kOtherFp8},
    {".absmax", "bitsandbytes", "use the checkpoint it was made from"},
    {".SCB", "bitsandbytes int8", "use the checkpoint it was made from"},
    {".weight_scale_2", "NVFP4", kOtherFp8},
};

/// One word between dots of a tensor's name.
bool has_word(const std::string& name, const std::string& word) {
  for (size_t begin = 0; begin <= name.size();) {
    const auto end = std::min(name.find('.', begin), name.size());
    if (name.compare(begin, end - begin, word) == 0) return true;
    begin = end + 1;
  }
  return false;
}

/// Modules the published FP8 checkpoints leave alone: whole words of a tensor's name.
constexpr const char* kLeftWords[] = {
    "lm_head",
    "embed_tokens",
    "word_embeddings",
    "wte",
    "wpe",
    "score",
    "gate",
    "router",
    "shared_expert_gate",
    "visual",
    "vision_tower",
    "vision_model",
    "audio_tower",
    "multi_modal_projector",
    "mlp1",
    "conv1d",
    "in_proj_a",
    "in_proj_b",
    "in_proj_ba",
    "eh_proj",
    "shared_head",
    "fc",
    "weights_proj",
};

}  // namespace

QuantMethod quant_method(const std::string& name) {
  if (name.empty()) return QuantMethod::kNone;
  if (name == "fp8") return QuantMethod::kFp8;
  if (name == "mxfp4") return QuantMethod::kMxfp4;
  fail("quantization '", name, "': this version writes fp8 (blocks of 128 x 128) and mxfp4");
}

const char* quant_name(QuantMethod method) {
  return method == QuantMethod::kFp8 ? "fp8" : method == QuantMethod::kMxfp4 ? "mxfp4" : "";
}

Quantization quantization_of(const std::string& path, const CheckpointReader& reader) {
  namespace fs = std::filesystem;
  const auto config = fs::path(path) / "config.json";
  Quantization result;
  if (std::error_code error; fs::is_directory(path, error) && fs::exists(config, error)) {
    Json content;
    try {
      std::ifstream file(config);
      content = Json::parse(file);
    } catch (const nlohmann::json::exception& problem) {
      fail(config.string(), ": not JSON: ", problem.what());
    }
    result = read_quantization(content);
  }
  for (const auto& [name, tensor] : reader.tensors()) {
    for (const auto& row : kEndings) {
      if (name.ends_with(row.ending)) refuse_quantization(path + ": tensor '" + name + "'", row.what, row.advice);
    }
    if (result.method != QuantMethod::kNone) continue;
    if (name.ends_with("_scale_inv")) result.method = QuantMethod::kFp8;
    if (name.ends_with("_blocks") && reader.find(name.substr(0, name.size() - 7) + "_scales"))
      result.method = QuantMethod::kMxfp4;
  }
  return result;
}

bool is_quantized_weight(QuantMethod method, const std::string& name, const std::vector<int64_t>& shape) {
  if (std::any_of(std::begin(kLeftWords), std::end(kLeftWords), [&](const char* word) { return has_word(name, word); }))
    return false;
  if (method == QuantMethod::kFp8)
    return shape.size() == 2 && name.ends_with(".weight") && name.find("norm") == std::string::npos &&
           name.find("embed") == std::string::npos;
  if (method == QuantMethod::kMxfp4)
    return shape.size() == 3 && shape[1] % 32 == 0 &&
           (name.ends_with(".experts.gate_up_proj") || name.ends_with(".experts.down_proj"));
  return false;
}

Json quantization_config(QuantMethod method, BlockSize block, const std::vector<std::string>& left) {
  if (method == QuantMethod::kMxfp4) return {{"quant_method", "mxfp4"}, {"modules_to_not_convert", left}};
  return {{"activation_scheme", "dynamic"},
          {"fmt", "e4m3"},
          {"quant_method", "fp8"},
          {"weight_block_size", {block.rows, block.cols}},
          {"modules_to_not_convert", left}};
}

}  // namespace mcore_bridge
