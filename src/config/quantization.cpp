#include "config/quantization.h"

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
    {"awq", "4 bit integers", kDequantize},
    {"gptq", "packed integers", kDequantize},
    {"bitsandbytes", "NF4, FP4 or int8",
     "use the checkpoint it was made from; to train on a small GPU take LoRA on the bfloat16 or FP8 checkpoint"},
    {"compressed-tensors", "packed or per-channel", "use the bfloat16 checkpoint, or the model's blockwise FP8 one"},
    {"fbgemm_fp8", "one scale per row", "use the bfloat16 checkpoint, or the model's blockwise FP8 one"},
    {"modelopt", "NVFP4 or static FP8", "use the bfloat16 checkpoint, or the model's blockwise FP8 one"},
    {"quark", "AMD Quark", kDequantize},
    {"hqq", "half-quadratic", kDequantize},
    {"aqlm", "additive codebooks", kDequantize},
    {"eetq", "int8", kDequantize},
    {"torchao", "tensor subclasses", kDequantize},
};

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

}  // namespace

void refuse_quantization(const std::string& where, const std::string& what, const std::string& advice) {
  fail(where, ": the checkpoint is quantised with ", what,
       ", which is not read by this version (blockwise FP8 and MXFP4 are): ", advice);
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
      refuse_quantization(where, "fp8 with activation_scheme " + scheme,
                          "use the bfloat16 checkpoint, or the model's blockwise FP8 one");
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
    if (method == row.method) refuse_quantization(where, method + " (" + row.what + ")", row.advice);
  }
  refuse_quantization(where, "quant_method '" + method + "'", kDequantize);
}

}  // namespace mcore_bridge
