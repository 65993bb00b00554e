// Formulae: linear and dynamic NTK as Transformers names them, YaRN https://arxiv.org/abs/2309.00071, LongRoPE
// https://arxiv.org/abs/2402.13753, Llama 3.1's wavelength-dependent scaling.
#include "config/rope_scaling.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "config/json_value.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

/// rope_scaling with its numbers checked as they are read.
class Scaling {
 public:
  explicit Scaling(const ModelConfig& config) : values_(config.rope_scaling) {}
  std::string kind() const {
    return json_string(values_, "rope_type", json_string(values_, "type", "default", kField), kField);
  }
  bool has(const char* key) const { return json_find(values_, key) != nullptr; }
  double number(const char* key) const {
    MCB_CHECK(has(key), "rope_scaling: ", kind(), " needs '", key, "'");
    return json_number(values_, key, 0, kField);
  }
  double positive(const char* key) const {
    const auto value = number(key);
    MCB_CHECK(value > 0, "rope_scaling: '", key, "' is ", value, ", expected a positive number");
    return value;
  }
  double number(const char* key, double otherwise) const { return has(key) ? number(key) : otherwise; }
  bool flag(const char* key, bool otherwise) const { return json_bool(values_, key, otherwise, kField); }
  std::vector<double> list(const char* key, size_t length) const {
    MCB_CHECK(has(key) && values_[key].is_array(), "rope_scaling: ", kind(), " needs the list '", key, "'");
    std::vector<double> result;
    for (const auto& item : values_[key]) {
      MCB_CHECK(item.is_number() && item > 0, "rope_scaling: '", key, "' has ", item.dump(),
                ", expected positive numbers");
      result.push_back(item.get<double>());
    }
    MCB_CHECK(result.size() == length, "rope_scaling: '", key, "' has ", result.size(), " entries, expected ", length,
              " (one per rotated pair)");
    return result;
  }

 private:
  static constexpr const char* kField = "rope_scaling";
  const Json& values_;
};

int64_t rotated_width(const ModelConfig& config) {
  return static_cast<int64_t>(config.head_dim() * config.partial_rotary_factor.value_or(config.rotary_percent));
}

std::vector<float> powers(double base, int64_t width) {
  std::vector<float> result;
  // In float, as Transformers computes them.
  for (int64_t i = 0; i < width; i += 2)
    result.push_back(std::pow(static_cast<float>(base), static_cast<float>(i) / static_cast<float>(width)));
  return result;
}

std::vector<float> inverse(std::vector<float> values) {
  for (auto& value : values) value = 1.0f / value;
  return values;
}

int64_t needed_length(const ModelConfig& config, const Scaling& scaling) {
  // The config's own field wins over the dictionary's, as in Transformers (Phi-3).
  if (config.original_max_position_embeddings) return *config.original_max_position_embeddings;
  if (scaling.has("original_max_position_embeddings"))
    return static_cast<int64_t>(scaling.positive("original_max_position_embeddings"));
  MCB_CHECK(config.max_position_embeddings, "rope_scaling: ", scaling.kind(), " needs max_position_embeddings");
  return *config.max_position_embeddings;
}

RopeFrequencies linear(const ModelConfig& config, const Scaling& scaling, int64_t) {
  auto frequencies = inverse(powers(config.rotary_base, rotated_width(config)));
  const auto factor = static_cast<float>(scaling.positive("factor"));
  for (auto& value : frequencies) value /= factor;
  return {frequencies, 1};
}

RopeFrequencies dynamic(const ModelConfig& config, const Scaling& scaling, int64_t seq_len) {
  const auto width = rotated_width(config);
  MCB_CHECK(width > 2, "rope_scaling: dynamic needs more than 2 rotated entries per head, found ", width);
  const double exponent = static_cast<double>(width) / static_cast<double>(width - 2);
  double base = config.rotary_base;
  if (scaling.has("alpha")) {
    base *= std::pow(scaling.positive("alpha"), exponent);
  } else {
    MCB_CHECK(config.max_position_embeddings, "rope_scaling: dynamic needs max_position_embeddings");
    const double factor = scaling.positive("factor"), limit = static_cast<double>(*config.max_position_embeddings);
    const double length = std::max(static_cast<double>(seq_len), limit);
    base *= std::pow(factor * length / limit - (factor - 1), exponent);
  }
  return {inverse(powers(base, width)), 1};
}

RopeFrequencies yarn(const ModelConfig& config, const Scaling& scaling, int64_t) {
  const auto width = rotated_width(config);
  const double original = static_cast<double>(needed_length(config, scaling));
  double factor = 0;
  if (scaling.has("factor")) {
    factor = scaling.positive("factor");
  } else {
    MCB_CHECK(config.max_position_embeddings, "rope_scaling: yarn needs 'factor' or max_position_embeddings");
    factor = static_cast<double>(*config.max_position_embeddings) / original;
  }
  auto magnitude = [&](double weight) { return factor <= 1 ? 1.0 : 0.1 * weight * std::log(factor) + 1.0; };
  double attention = 0;
  if (scaling.has("attention_factor")) {
    attention = scaling.number("attention_factor");
  } else if (scaling.number("mscale", 0) != 0 && scaling.number("mscale_all_dim", 0) != 0) {
    attention = magnitude(scaling.number("mscale")) / magnitude(scaling.number("mscale_all_dim"));
  } else {
    attention = magnitude(1);
  }
  // The pair that turns `rotations` times over the original context.
  auto pair_at = [&](double rotations) {
    return static_cast<double>(width) * std::log(original / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(config.rotary_base));
  };
  const auto beta_fast = scaling.number("beta_fast", 0) != 0 ? scaling.number("beta_fast") : 32.0;
  const auto beta_slow = scaling.number("beta_slow", 0) != 0 ? scaling.number("beta_slow") : 1.0;
  double low = pair_at(beta_fast), high = pair_at(beta_slow);
  if (scaling.flag("truncate", true)) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(width - 1));
  if (low == high) high += 0.001;
  const auto base = powers(config.rotary_base, width);
  RopeFrequencies result{{}, attention};
  for (size_t i = 0; i < base.size(); ++i) {
    const float ramp = std::clamp(static_cast<float>((static_cast<double>(i) - low) / (high - low)), 0.0f, 1.0f);
    const float extrapolated = 1.0f / base[i], interpolated = 1.0f / (static_cast<float>(factor) * base[i]);
    const float keep = 1 - ramp;
    result.inv_freq.push_back(interpolated * (1 - keep) + extrapolated * keep);
  }
  return result;
}

RopeFrequencies longrope(const ModelConfig& config, const Scaling& scaling, int64_t seq_len) {
  const auto width = rotated_width(config);
  const auto original = needed_length(config, scaling);
  double factor = 1;
  if (scaling.has("factor")) {
    factor = scaling.positive("factor");
  } else if (config.max_position_embeddings) {
    factor = static_cast<double>(*config.max_position_embeddings) / static_cast<double>(original);
  }
  const double inferred = factor <= 1 ? 1.0 : std::sqrt(1 + std::log(factor) / std::log(static_cast<double>(original)));
  const auto stretch =
      scaling.list(seq_len > original ? "long_factor" : "short_factor", static_cast<size_t>(width / 2));
  auto values = powers(config.rotary_base, width);
  for (size_t i = 0; i < values.size(); ++i) values[i] *= static_cast<float>(stretch[i]);
  return {inverse(values), scaling.number("attention_factor", inferred)};
}

RopeFrequencies llama3(const ModelConfig& config, const Scaling& scaling, int64_t) {
  const float factor = static_cast<float>(scaling.positive("factor"));
  const double low = scaling.positive("low_freq_factor"), high = scaling.positive("high_freq_factor");
  MCB_CHECK(low < high, "rope_scaling: low_freq_factor ", low, " must be below high_freq_factor ", high);
  const double original = static_cast<double>(needed_length(config, scaling));
  auto frequencies = inverse(powers(config.rotary_base, rotated_width(config)));
  for (auto& value : frequencies) {
    const double wavelength = 2 * std::numbers::pi / value;
    if (wavelength < original / high) continue;
    if (wavelength > original / low) {
      value /= factor;
    } else {
      const auto smooth = static_cast<float>((original / wavelength - low) / (high - low));
      value = (1 - smooth) * value / factor + smooth * value;
    }
  }
  return {frequencies, 1};
}

RopeFrequencies unscaled(const ModelConfig& config, const Scaling&, int64_t) {
  return {inverse(powers(config.rotary_base, rotated_width(config))), 1};
}

struct Kind {
  const char* name;
  RopeFrequencies (*compute)(const ModelConfig&, const Scaling&, int64_t seq_len);
  bool depends_on_length;
};
constexpr Kind kKinds[] = {
    {"default", unscaled, false}, {"linear", linear, false},    {"dynamic", dynamic, true},
    {"yarn", yarn, false},        {"longrope", longrope, true}, {"llama3", llama3, false},
};

const Kind& kind_of(const Scaling& scaling) {
  for (const auto& kind : kKinds) {
    if (scaling.kind() == kind.name) return kind;
  }
  fail("rope_scaling: rope_type '", scaling.kind(), "' is not one of default, linear, dynamic, yarn, longrope, llama3");
}

}  // namespace

RopeFrequencies rope_frequencies(const ModelConfig& config, int64_t seq_len) {
  const Scaling scaling(config);
  return kind_of(scaling).compute(config, scaling, seq_len);
}

bool rope_depends_on_length(const ModelConfig& config) { return kind_of(Scaling(config)).depends_on_length; }

}  // namespace mcore_bridge
