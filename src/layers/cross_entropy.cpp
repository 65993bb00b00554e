#include "layers/cross_entropy.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

constexpr int64_t kIgnore = -100;
constexpr int64_t kChunkElements = 1 << 25;  // bounds the fp32 temporaries to 128 MiB whatever the batch

/// Calls f(first row, rows) over row chunks whose fp32 copies stay small.
template <class F>
void for_row_chunks(int64_t rows, int64_t columns, F f) {
  const auto chunk = std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, columns));
  for (int64_t first = 0; first < rows; first += chunk) f(first, std::min(chunk, rows - first));
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& logits, const at::Tensor& labels,
                            int64_t vocab_size, const Group* group) {
    const auto local = logits.size(-1), rows = labels.numel();
    const auto first_column = group->rank() * local;
    const auto columns = std::clamp<int64_t>(vocab_size - first_column, 0, local);
    const auto matrix = logits.reshape({rows, local});
    const auto targets = labels.reshape({rows});
    // Column of the target here; out of range where another rank holds it or the token carries no loss.
    const auto here = targets.ge(first_column).logical_and_(targets.lt(first_column + columns));
    const auto column = (targets - first_column).masked_fill_(here.logical_not(), 0);

    const auto fp32 = logits.options().dtype(at::kFloat);
    auto maximum = at::full({rows}, -std::numeric_limits<float>::infinity(), fp32);
    if (columns > 0) maximum.copy_(matrix.narrow(1, 0, columns).amax(1));
    group->all_reduce_max(maximum);
    auto sums = at::zeros({2, rows}, fp32);  // sum of exponentials; logit of the target
    if (columns > 0) {
      for_row_chunks(rows, columns, [&](int64_t first, int64_t count) {
        auto shifted = matrix.narrow(0, first, count).narrow(1, 0, columns).to(at::kFloat) -
                       maximum.narrow(0, first, count).unsqueeze(1);
        auto target = shifted.gather(1, column.narrow(0, first, count).unsqueeze(1)).squeeze(1);
        sums[1].narrow(0, first, count).copy_(target.masked_fill_(here.narrow(0, first, count).logical_not(), 0));
        sums[0].narrow(0, first, count).copy_(shifted.exp_().sum(1));
      });
    }
    group->all_reduce(sums);
    auto loss = (sums[0].log() - sums[1]).masked_fill_(targets.eq(kIgnore), 0);
    const auto log_sum = sums[0].log() + maximum;
    context->save_for_backward({logits, log_sum, column, here, targets});
    context->saved_data["columns"] = columns;
    return loss.reshape(labels.sizes());
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto& logits = saved[0];
    const auto columns = context->saved_data["columns"].toInt();
    const auto local = logits.size(-1), rows = saved[1].numel();
    const auto matrix = logits.reshape({rows, local});
    auto grad = at::empty({rows, local}, logits.options());
    if (columns < local) grad.narrow(1, columns, local - columns).zero_();
    const auto scale = grads[0].reshape({rows}).to(at::kFloat).masked_fill(saved[4].eq(kIgnore), 0);
    if (columns > 0) {
      for_row_chunks(rows, columns, [&](int64_t first, int64_t count) {
        auto probability = (matrix.narrow(0, first, count).narrow(1, 0, columns).to(at::kFloat) -
                            saved[1].narrow(0, first, count).unsqueeze(1))
                               .exp_();
        probability.scatter_add_(1, saved[2].narrow(0, first, count).unsqueeze(1),
                                 saved[3].narrow(0, first, count).to(at::kFloat).neg().unsqueeze(1));
        probability.mul_(scale.narrow(0, first, count).unsqueeze(1));
        grad.narrow(0, first, count).narrow(1, 0, columns).copy_(probability);
      });
    }
    return {grad.reshape(logits.sizes()), Variable(), Variable(), Variable()};
  }
};

}  // namespace

at::Tensor vocab_parallel_cross_entropy(const at::Tensor& logits_sbv, const at::Tensor& labels_sb, int64_t vocab_size,
                                        const Group& group) {
  return CrossEntropy::apply(logits_sbv, labels_sb, vocab_size, &group);
}

}  // namespace mcore_bridge
