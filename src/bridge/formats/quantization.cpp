#include "bridge/formats/quantization.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

struct Refused {
  const char* method;
  const char* what;
  const char* advice;
};

constexpr const char* kDequantize =
    "use the model's bfloat16 checkpoint, or open it in Transformers on a machine that runs it and save it dequantised";

constexpr Refused kRefused[] = {
    {"awq", "AWQ (4 bit integers)", kDequantize},
    {"gptq", "GPTQ (packed integers)", kDequantize},
    {"bitsandbytes", "bitsandbytes (NF4, FP4 or int8)",
     "use the checkpoint it was made from; to train on a small GPU take LoRA on the bfloat16 or FP8 checkpoint"},
    {"compressed-tensors", "compressed-tensors", "use the bfloat16 checkpoint, or the model's blockwise FP8 one"},
    {"fbgemm_fp8", "FBGEMM FP8 (one scale per row)", "use the bfloat16 checkpoint, or the model's blockwise FP8 one"},
    {"modelopt", "ModelOpt (NVFP4 or static FP8)", "use the bfloat16 checkpoint, or the model's blockwise FP8 one"},
    {"quark", "Quark", kDequantize},
    {"hqq", "HQQ", kDequantize},
    {"aqlm", "AQLM", kDequantize},
    {"eetq", "EETQ (int8)", kDequantize},
    {"torchao", "torchao", kDequantize},
};

/// Tensors that betray a method when config.json is silent.
constexpr Refused kEndings[] = {
    {".qzeros", "GPTQ or AWQ (packed integers)", kDequantize},
    {".qweight", "GPTQ or AWQ (packed integers)", kDequantize},
    {".g_idx", "GPTQ (packed integers)", kDequantize},
    {".weight_packed", "compressed-tensors", "use the bfloat16 checkpoint, or the model's blockwise FP8 one"},
    {".absmax", "bitsandbytes", "use the checkpoint it was made from"},
    {".SCB", "bitsandbytes int8", "use the checkpoint it was made from"},
    {".weight_scale_2", "NVFP4", "use the bfloat16 checkpoint, or the model's blockwise FP8 one"},
};

[[noreturn]] void refuse(const std::string& where, const std::string& what, const std::string& advice) {
  fail(where, ": the checkpoint is quantised with ", what,
       ", which is not read by this version (blockwise FP8 and MXFP4 are): ", advice);
}

const Json* find_config(const Json& config) {
  for (const char* key : {"quantization_config", "compression_config"}) {
    if (const auto found = config.find(key); found != config.end() && !found->is_null()) return &*found;
  }
  for (const char* key : {"text_config", "llm_config", "thinker_config"}) {
    if (const auto found = config.find(key); found != config.end() && found->is_object()) {
      if (const auto* inner = find_config(*found)) return inner;
    }
  }
  return nullptr;
}

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
    "lm_head", "embed_tokens", "word_embeddings", "wte", "wpe", "score", "gate", "router", "shared_expert_gate",
    "visual", "vision_tower", "vision_model", "audio_tower", "multi_modal_projector", "mlp1", "conv1d", "in_proj_a",
    "in_proj_b", "in_proj_ba", "eh_proj", "shared_head", "fc", "weights_proj",
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

Quantization read_quantization(const Json& config) {
  const auto* quantization = find_config(config);
  if (!quantization) return {};
  const std::string where = "config.json: quantization_config";
  MCB_CHECK(quantization->is_object(), where, " is no object");
  auto method = quantization->value("quant_method", std::string());
  if (method.empty() && (quantization->value("load_in_4bit", false) || quantization->value("load_in_8bit", false)))
    method = "bitsandbytes";
  if (method == "mxfp4") return {.method = QuantMethod::kMxfp4};
  if (method == "fp8") {
    const auto scheme = quantization->value("activation_scheme", std::string("dynamic"));
    if (scheme != "dynamic")
      refuse(where, "fp8 with activation_scheme " + scheme, "use the bfloat16 checkpoint, or the model's blockwise FP8 one");
    Quantization result{.method = QuantMethod::kFp8};
    const auto block = quantization->find("weight_block_size");
    if (block == quantization->end() || block->is_null()) {
      result.block = {INT64_C(1) << 40, INT64_C(1) << 40};
      return result;
    }
    MCB_CHECK(block->is_array() && block->size() == 2 && (*block)[0].is_number_integer() &&
                  (*block)[1].is_number_integer() && (*block)[0] > 0 && (*block)[1] > 0,
              where, ": weight_block_size ", block->dump(), " is no pair of sizes");
    result.block = {(*block)[0].get<int64_t>(), (*block)[1].get<int64_t>()};
    return result;
  }
  for (const auto& row : kRefused) {
    if (method == row.method) refuse(where, row.what, row.advice);
  }
  refuse(where, "quant_method '" + method + "'", kDequantize);
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
      if (name.ends_with(row.method)) refuse(path + ": tensor '" + name + "'", row.what, row.advice);
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
