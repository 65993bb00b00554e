// The quantised formats on single blocks, against what their specifications say.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bridge/formats/float_bytes.h"
#include "bridge/formats/fp8.h"
#include "bridge/formats/mxfp4.h"
#include "bridge/formats/quantization.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {

TEST(Fp8, ABoxTakesEachBlocksScaleWhereverItBegins) {
  constexpr BlockSize block{2, 3};
  // A 5 x 7 matrix of ones (0x38) has 3 x 3 blocks; the box begins at (1, 2), so at blocks (0, 0).
  const std::vector<uint8_t> ones(3 * 4, 0x38);
  const float scales[] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  float values[12];
  dequantize_fp8(ones.data(), 1, 2, 3, 4, scales, 3, block, values);
  const std::vector<float> expected = {1, 2, 2, 2, 4, 5, 5, 5, 4, 5, 5, 5};
  EXPECT_EQ(std::vector<float>(values, values + 12), expected);
}

TEST(Fp8, EveryCodeSurvivesARoundTrip) {
  std::vector<uint8_t> codes, back(254);
  for (int i = 0; i < 256; ++i) {
    if ((i & 0x7F) != 0x7F) codes.push_back(static_cast<uint8_t>(i));
  }
  std::vector<float> values(codes.size());
  const float one = 1, amax = 448;
  dequantize_fp8(codes.data(), 0, 0, 1, 254, &one, 1, {1, 1000}, values.data());
  EXPECT_EQ(*std::max_element(values.begin(), values.end()), 448);
  const float factor = fp8_factor(amax);
  quantize_fp8(values.data(), 0, 0, 1, 254, &factor, 1, {1, 1000}, back.data());
  EXPECT_EQ(back, codes);
  EXPECT_EQ(fp8_scale(amax), 1);
}

TEST(Fp8, ZerosAndTinyNumbersHaveScaleOne) {
  EXPECT_EQ(fp8_scale(0), 1);
  const float tiny = 1e-40f;  // 448 / tiny overflows
  EXPECT_EQ(fp8_scale(tiny), 1);
  uint8_t code = 9;
  const float none = fp8_factor(tiny);
  quantize_fp8(&tiny, 0, 0, 1, 1, &none, 1, {}, &code);
  EXPECT_EQ(code, 0);
}

TEST(Fp8, NaNAndInfinityAreSeen) {
  for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    float amax = 0;
    EXPECT_FALSE(raise_amax(&bad, 0, 0, 1, 1, &amax, 1, {}));
  }
  float amax = 2;
  const float values[] = {-3, 1};
  EXPECT_TRUE(raise_amax(values, 0, 0, 1, 2, &amax, 1, {}));
  EXPECT_EQ(amax, 3);
}

TEST(Mxfp4, LowFourBitsComeFirst) {
  uint8_t bytes[16] = {0x21, 0xFA};  // 0.5, 1; -1, -6
  float values[32];
  decode_mxfp4(bytes, 128, values);
  EXPECT_EQ(values[0], 1);
  EXPECT_EQ(values[1], 2);
  EXPECT_EQ(values[2], -2);
  EXPECT_EQ(values[3], -12);
}

TEST(Mxfp4, DecodedGroupsAreEncodedWithoutChangeOfValue) {
  uint32_t state = 1;
  for (int round = 0; round < 3000; ++round) {
    uint8_t bytes[16], again[16], scale;
    for (auto& byte : bytes) {
      state = state * 1664525 + 1013904223;
      byte = static_cast<uint8_t>((state >> 24) & (round % 3 == 0 ? 0x33 : 0xFF));  // some without large codes
    }
    const auto given = static_cast<uint8_t>(round % 250);
    float values[32], back[32];
    decode_mxfp4(bytes, given, values);
    ASSERT_TRUE(encode_mxfp4(values, again, scale));
    decode_mxfp4(again, scale, back);
    for (int i = 0; i < 32; ++i) ASSERT_EQ(values[i], back[i]) << "scale " << int(given);
  }
}

TEST(Mxfp4, TiesGoToEvenCodesAndNothingIsCutOff) {
  float values[32] = {6, 0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5, -5.5f};
  uint8_t bytes[16], scale;
  float back[32];
  ASSERT_TRUE(encode_mxfp4(values, bytes, scale));
  EXPECT_EQ(scale, 127);
  decode_mxfp4(bytes, scale, back);
  EXPECT_EQ(std::vector<float>(back, back + 9), (std::vector<float>{6, 0, 1, 1, 2, 2, 4, 4, -6}));
  values[0] = 6.01f;  // larger than 6: the next power of two
  ASSERT_TRUE(encode_mxfp4(values, bytes, scale));
  EXPECT_EQ(scale, 128);
  values[3] = std::nanf("");
  EXPECT_FALSE(encode_mxfp4(values, bytes, scale));
}

TEST(Quantization, ReadsWhatConfigsSay) {
  EXPECT_EQ(read_quantization({{"model_type", "x"}}).method, QuantMethod::kNone);
  const Json fp8 = {{"quant_method", "fp8"}, {"weight_block_size", {64, 128}}};
  EXPECT_EQ(read_quantization({{"quantization_config", fp8}}).block, (BlockSize{64, 128}));
  EXPECT_EQ(read_quantization({{"text_config", {{"quantization_config", fp8}}}}).method, QuantMethod::kFp8);
  EXPECT_EQ(read_quantization({{"quantization_config", {{"quant_method", "mxfp4"}}}}).method, QuantMethod::kMxfp4);
  EXPECT_THROW(read_quantization({{"quantization_config", {{"quant_method", "fp8"}, {"weight_block_size", 5}}}}),
               ValueError);
  EXPECT_THROW(read_quantization({{"quantization_config", {{"load_in_4bit", true}}}}), ValueError);
  EXPECT_THROW(read_quantization({{"quantization_config", {{"quant_method", "fp8"}, {"activation_scheme", "static"}}}}),
               ValueError);
}

TEST(Quantization, NamesTheWeightsThatPublishedCheckpointsQuantise) {
  const std::vector<int64_t> matrix = {256, 128};
  auto fp8 = [&](const char* name) { return is_quantized_weight(QuantMethod::kFp8, name, matrix); };
  for (const char* name : {"model.layers.0.self_attn.q_proj.weight", "model.layers.3.mlp.experts.7.down_proj.weight",
                           "model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"})
    EXPECT_TRUE(fp8(name)) << name;
  for (const char* name :
       {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight", "model.norm.weight",
        "model.layers.0.mlp.shared_expert_gate.weight", "model.visual.blocks.0.attn.qkv.weight",
        "model.layers.61.eh_proj.weight", "model.layers.0.block_sparse_moe.gate.weight"})
    EXPECT_FALSE(fp8(name)) << name;
  EXPECT_TRUE(is_quantized_weight(QuantMethod::kMxfp4, "model.layers.0.mlp.experts.gate_up_proj", {4, 64, 10}));
  EXPECT_FALSE(is_quantized_weight(QuantMethod::kMxfp4, "model.layers.0.mlp.experts.gate_up_proj", {4, 60, 10}));
  EXPECT_FALSE(is_quantized_weight(QuantMethod::kMxfp4, "model.layers.0.mlp.gate_up_proj.weight", {64, 10}));
}

}  // namespace mcore_bridge
