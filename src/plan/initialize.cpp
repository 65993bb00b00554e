#include "plan/initialize.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <numbers>

#include "core/philox.h"

namespace mcore_bridge {
namespace {

uint64_t fnv1a(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const unsigned char c : text) hash = (hash ^ c) * 0x100000001b3;
  return hash;
}

/// Uniform in (0, 1].
float unit(uint32_t bits) { return (static_cast<float>(bits >> 8) + 1.0f) * 0x1p-24f; }

struct Source {
  uint64_t seed, stream;
  PhiloxBlock block(uint64_t index) const {
    return philox({static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), static_cast<uint32_t>(stream),
                   static_cast<uint32_t>(stream >> 32)},
                  seed);
  }
  float normal(uint64_t index) const {
    const auto bits = block(index);
    return std::sqrt(-2.0f * std::log(unit(bits[0]))) * std::cos(2.0f * std::numbers::pi_v<float> * unit(bits[1]));
  }
  float uniform(uint64_t index) const { return 2.0f * unit(block(index)[0]) - 1.0f; }
};

}  // namespace

void initialize_parameter(at::Tensor parameter, const ParameterPlan& plan, uint64_t seed, double std, int64_t layers) {
  using Init = WeightRule::Init;
  at::NoGradGuard no_grad;
  auto values = at::zeros(plan.sizes, at::kFloat);
  auto* data = values.mutable_data_ptr<float>();
  const auto init = plan.rule.init;
  const auto columns = plan.columns();
  if (init == Init::kScaledNormal) std /= std::sqrt(2.0 * static_cast<double>(layers));
  for (const auto& region : plan.regions) {
    const auto& tensor = plan.tensors[region.tensor];
    const Source source{seed, fnv1a(tensor.name)};
    const auto strides = hf_strides(tensor, region);
    // PEFT's kaiming_uniform with a = sqrt(5): bound sqrt(6 / (6 * fan_in)).
    const auto bound = static_cast<float>(1.0 / std::sqrt(static_cast<double>(tensor.cols)));
    at::parallel_for(0, region.rows, std::max<int64_t>(1, 16384 / region.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        auto* out = data + region.parameter_row(row) * columns + region.col;
        const auto first = strides.offset + row * strides.row;
        for (int64_t col = 0; col < region.cols; ++col) {
          switch (init) {
            case Init::kOne:
              out[col] = 1;
              break;
            case Init::kZero:
              out[col] = 0;
              break;
            case Init::kKaimingUniform:
              out[col] = bound * source.uniform(static_cast<uint64_t>(first + col * strides.col));
              break;
            default:
              out[col] = static_cast<float>(std) * source.normal(static_cast<uint64_t>(first + col * strides.col));
          }
        }
      }
    });
  }
  parameter.copy_(values);
}

}  // namespace mcore_bridge
