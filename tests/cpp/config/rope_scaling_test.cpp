#include "config/rope_scaling.h"

#include <gtest/gtest.h>

#include <cmath>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

/// Heads of 8 entries, base 10000: the pairs turn at 1, 1/10, 1/100 and 1/1000 of a radian per token.
ModelConfig config_with(const Json& scaling, double share = 1) {
  ModelConfig config;
  config.hidden_size = 64;
  config.num_attention_heads = 8;
  config.max_position_embeddings = 64;
  config.rotary_percent = share;
  config.rope_scaling = scaling;
  return config;
}

void expect_near(const std::vector<float>& actual, const std::vector<double>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(actual[i] / expected[i], 1, 2e-6) << "pair " << i;
}

}  // namespace

TEST(RopeScaling, DefaultAndPartial) {
  const auto all = rope_frequencies(config_with(nullptr), 10);
  expect_near(all.inv_freq, {1, 0.1, 0.01, 0.001});
  EXPECT_EQ(all.attention_scaling, 1);
  expect_near(rope_frequencies(config_with(nullptr, 0.5), 10).inv_freq, {1, 0.01});
}

TEST(RopeScaling, Linear) {
  const auto scaled = rope_frequencies(config_with({{"type", "linear"}, {"factor", 4}}), 10);
  expect_near(scaled.inv_freq, {0.25, 0.025, 0.0025, 0.00025});
}

TEST(RopeScaling, DynamicFollowsTheLength) {
  const auto config = config_with({{"rope_type", "dynamic"}, {"factor", 2.0}});
  EXPECT_TRUE(rope_depends_on_length(config));
  expect_near(rope_frequencies(config, 64).inv_freq, {1, 0.1, 0.01, 0.001});
  expect_near(rope_frequencies(config, 5).inv_freq, {1, 0.1, 0.01, 0.001});
  // At twice the length the base grows by (2 * 2 - 1)^(8/6), so pair i slows down by 3^(i/3).
  expect_near(rope_frequencies(config, 128).inv_freq, {1, 0.1 / std::cbrt(3.0), 0.01 / std::cbrt(9.0), 0.001 / 3.0});
}

TEST(RopeScaling, DynamicWithAlpha) {
  const auto config = config_with({{"rope_type", "dynamic"}, {"alpha", 8.0}});
  expect_near(rope_frequencies(config, 10).inv_freq, {1, 0.1 / 2, 0.01 / 4, 0.001 / 8});
}

TEST(RopeScaling, YarnEndsAreExtrapolatedAndInterpolated) {
  const auto config = config_with(
      {{"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 4096}, {"beta_fast", 100}});
  const auto scaled = rope_frequencies(config, 10);
  EXPECT_NEAR(scaled.attention_scaling, 0.1 * std::log(4.0) + 1, 1e-12);
  EXPECT_NEAR(scaled.inv_freq.front(), 1, 1e-6) << "turns often: unchanged";
  EXPECT_NEAR(scaled.inv_freq.back() / (0.001 / 4), 1, 1e-5) << "turns less than once: divided by the factor";
}

TEST(RopeScaling, YarnAttentionFactor) {
  auto factor_of = [](Json more) {
    Json scaling = {{"rope_type", "yarn"}, {"factor", 16.0}, {"original_max_position_embeddings", 4096}};
    scaling.update(more);
    return rope_frequencies(config_with(scaling), 10).attention_scaling;
  };
  EXPECT_NEAR(factor_of({{"mscale", 1.0}, {"mscale_all_dim", 1.0}}), 1, 1e-12);
  EXPECT_NEAR(factor_of({{"mscale", 2.0}, {"mscale_all_dim", 1.0}}),
              (0.2 * std::log(16.0) + 1) / (0.1 * std::log(16.0) + 1), 1e-12);
  EXPECT_EQ(factor_of({{"attention_factor", 0.5}}), 0.5);
}

TEST(RopeScaling, LongropeSwitchesAtTheOriginalLength) {
  const auto config = config_with({{"rope_type", "longrope"},
                                   {"short_factor", {1, 2, 4, 8}},
                                   {"long_factor", {2, 4, 8, 16}},
                                   {"original_max_position_embeddings", 16}});
  EXPECT_TRUE(rope_depends_on_length(config));
  expect_near(rope_frequencies(config, 16).inv_freq, {1, 0.1 / 2, 0.01 / 4, 0.001 / 8});
  expect_near(rope_frequencies(config, 17).inv_freq, {0.5, 0.1 / 4, 0.01 / 8, 0.001 / 16});
  EXPECT_NEAR(rope_frequencies(config, 1).attention_scaling, std::sqrt(1 + std::log(4.0) / std::log(16.0)), 1e-12);
}

TEST(RopeScaling, TheConfigsOriginalLengthWins) {
  auto config = config_with({{"rope_type", "longrope"},
                             {"short_factor", {1, 1, 1, 1}},
                             {"long_factor", {2, 2, 2, 2}},
                             {"original_max_position_embeddings", 16}});
  config.original_max_position_embeddings = 32;
  EXPECT_EQ(rope_frequencies(config, 20).inv_freq[0], 1);
  EXPECT_EQ(rope_frequencies(config, 33).inv_freq[0], 0.5f);
}

TEST(RopeScaling, Llama3) {
  // Wavelengths 6, 63, 628 and 6283 tokens against 8192/4 = 2048 (kept below) and 8192/1 (divided above).
  Json scaling = {{"rope_type", "llama3"},
                  {"factor", 8.0},
                  {"low_freq_factor", 1.0},
                  {"high_freq_factor", 4.0},
                  {"original_max_position_embeddings", 8192}};
  const double smooth = (8192 * 0.001 / (2 * M_PI) - 1) / 3;
  expect_near(rope_frequencies(config_with(scaling), 10).inv_freq,
              {1, 0.1, 0.01, (1 - smooth) * 0.001 / 8 + smooth * 0.001});
  scaling["original_max_position_embeddings"] = 100;
  EXPECT_NEAR(rope_frequencies(config_with(scaling), 10).inv_freq[3], 0.001 / 8, 1e-10);
}

TEST(RopeScaling, BadValuesAreRefusedByName) {
  auto error_of = [](const Json& scaling, double share = 1) -> std::string {
    try {
      rope_frequencies(config_with(scaling, share), 10);
    } catch (const ValueError& error) {
      return error.what();
    }
    return "no error";
  };
#define EXPECT_NAMES(part, ...) EXPECT_NE(error_of(__VA_ARGS__).find(part), std::string::npos) << error_of(__VA_ARGS__)
  EXPECT_NAMES("spiral", {{"rope_type", "spiral"}});
  EXPECT_NAMES("rope_type", {{"rope_type", 7}});
  EXPECT_NAMES("factor", {{"rope_type", "linear"}});
  EXPECT_NAMES("factor", {{"rope_type", "linear"}, {"factor", 0}});
  EXPECT_NAMES("factor", {{"rope_type", "dynamic"}, {"factor", "two"}});
  EXPECT_NAMES("rotated entries", {{"rope_type", "dynamic"}, {"factor", 2}}, 0.25);
  EXPECT_NAMES("truncate", {{"rope_type", "yarn"}, {"factor", 2}, {"truncate", "no"}});
  EXPECT_NAMES("long_factor", {{"rope_type", "longrope"},
                               {"factor", 2},
                               {"short_factor", {1, 1, 1, 1}},
                               {"long_factor", {1}},
                               {"original_max_position_embeddings", 5}});
  EXPECT_NAMES("short_factor", {{"rope_type", "longrope"}, {"short_factor", {1, "a", 1, 1}}});
  EXPECT_NAMES("low_freq_factor",
               {{"rope_type", "llama3"}, {"factor", 8}, {"low_freq_factor", 4}, {"high_freq_factor", 4}});
#undef EXPECT_NAMES
}

}  // namespace mcore_bridge
