#include "train/newton_schulz.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <map>
#include <vector>

namespace mcore_bridge {
namespace {

using Coefficients = std::vector<std::array<double, 3>>;

/// https://kellerjordan.github.io/posts/muon/, https://leloykun.github.io/ponder/muon-opt-coeffs/,
/// https://arxiv.org/abs/2505.16932 (each divided by 1.01^degree). After the last one: cycled, the third repeats its
/// last.
const std::map<std::string, Coefficients> kCoefficients = {{"simple", {{3.4445, -4.7750, 2.0315}}},
                                                           {"quintic",
                                                            {{4.0848, -6.8946, 2.9270},
                                                             {3.9505, -6.3029, 2.6377},
                                                             {3.7418, -5.5913, 2.3037},
                                                             {2.8769, -3.1427, 1.2046},
                                                             {2.8366, -3.0525, 1.2012}}},
                                                           {"polar_express",
                                                            {{8.2051, -22.9019, 16.4607},
                                                             {4.0664, -2.8612, 0.5184},
                                                             {3.9096, -2.8234, 0.5250},
                                                             {3.2856, -2.4153, 0.4853},
                                                             {2.2779, -1.6198, 0.3985},
                                                             {1.8726, -1.2307, 0.3585},
                                                             {1.8564, -1.2132, 0.3568},
                                                             {1.8750, -1.2500, 0.3750}}}};

/// TF32 inside, as asked; the user's setting again after.
class MatmulPrecision {
 public:
  explicit MatmulPrecision(const std::string& name) : before_(at::globalContext().float32MatmulPrecision()) {
    at::globalContext().setFloat32MatmulPrecision(name == "high" ? "high" : "highest");
  }
  ~MatmulPrecision() {
    at::globalContext().setFloat32MatmulPrecision(before_ == at::Float32MatmulPrecision::HIGHEST ? "highest"
                                                  : before_ == at::Float32MatmulPrecision::HIGH  ? "high"
                                                                                                 : "medium");
  }
  MatmulPrecision(const MatmulPrecision&) = delete;
  MatmulPrecision& operator=(const MatmulPrecision&) = delete;

 private:
  at::Float32MatmulPrecision before_;
};

at::Tensor summed(at::Tensor partial, const MatrixSplit& split) {
  if (!split.group) return partial;
  partial = partial.to(at::kFloat);
  split.group->all_reduce(partial);
  return split.copies > 1 ? partial / split.copies : partial;
}

}  // namespace

at::Tensor newton_schulz(const at::Tensor& matrix, const NewtonSchulzOptions& options, const MatrixSplit& split) {
  const auto& coefficients = kCoefficients.at(options.coefficients);
  const MatmulPrecision precision(options.precision);
  const auto dtype = options.precision == "medium" ? at::kBFloat16 : at::kFloat;
  const auto norm = summed(matrix.square().sum(), split).sqrt();
  auto x = (matrix / norm.clamp_min(1e-7)).to(dtype);
  // (X X^T) X = X (X^T X): the product that can be summed over the ranks, or the smaller one.
  const bool left = split.group ? split.dim == 1 : x.size(0) <= x.size(1);
  for (int64_t step = 0; step < options.steps; ++step) {
    const auto size = static_cast<int64_t>(coefficients.size());
    const auto at = options.coefficients == "polar_express" ? std::min(step, size - 1) : step % size;
    const auto [a, b, c] = coefficients[static_cast<size_t>(at)];
    const auto gram = summed(left ? at::mm(x, x.t()) : at::mm(x.t(), x), split).to(dtype);
    const auto polynomial = at::addmm(gram, gram, gram, b, c);
    x = left ? at::addmm(x, polynomial, x, a, 1) : at::addmm(x, x, polynomial, a, 1);
  }
  return x.to(at::kFloat);
}

}  // namespace mcore_bridge
