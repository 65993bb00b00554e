#include "kernels/cross_entropy.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <limits>

#include "kernels/device.h"

namespace mcore_bridge {
namespace {

at::ScalarType wide(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

std::optional<cuda::Type> block_type(const at::Tensor& logits) {
  const auto type = kernel_type(logits);
  const bool fits =
      type && logits.numel() > 0 && logits.is_contiguous() && vector_rows(logits.size(1), *type) && aligned(logits);
  return fits ? type : std::nullopt;
}

SoftmaxStatistics empty_statistics(const at::Tensor& logits) {
  const auto options = logits.options().dtype(at::kFloat);
  const auto all = at::empty({3, logits.size(0)}, options);
  return {all[0], all[1], all[2]};
}

cuda::CrossEntropy arguments(const at::Tensor& logits, const at::Tensor& labels, VocabColumns columns,
                             const SoftmaxStatistics& statistics) {
  return {.rows = logits.size(0),
          .columns = columns.count,
          .stride = logits.size(1),
          .first_column = columns.first,
          .logits = logits.mutable_data_ptr(),
          .labels = labels.const_data_ptr<int64_t>(),
          .maximum = statistics.maximum.mutable_data_ptr<float>(),
          .sum = statistics.sum.mutable_data_ptr<float>(),
          .target = statistics.target.mutable_data_ptr<float>()};
}

void set_weight(cuda::CrossEntropy& p, const at::Tensor& weight) {
  if (weight.dim() == 0)
    p.scale = weight.const_data_ptr<double>();
  else
    p.weight = weight.const_data_ptr<float>();
}

/// Column of the label in the block, and whether it is there.
std::pair<at::Tensor, at::Tensor> column_of(const at::Tensor& labels, VocabColumns columns) {
  const auto here = labels.ge(columns.first).logical_and_(labels.lt(columns.first + columns.count));
  return {(labels - columns.first).masked_fill_(here.logical_not(), 0), here};
}

}  // namespace

SoftmaxStatistics softmax_statistics(const at::Tensor& logits, const at::Tensor& given_labels, VocabColumns columns) {
  const auto labels = given_labels.contiguous();
  if (const auto type = block_type(logits)) {
    const c10::DeviceGuard guard(logits.device());
    auto statistics = empty_statistics(logits);
    cuda::cross_entropy_statistics(arguments(logits, labels, columns, statistics), *type, current_stream(logits));
    return statistics;
  }
  const auto options = logits.options().dtype(wide(logits));
  if (columns.count == 0) {
    return {at::full({logits.size(0)}, -std::numeric_limits<double>::infinity(), options),
            at::zeros({logits.size(0)}, options), at::zeros({logits.size(0)}, options)};
  }
  const auto real = logits.narrow(1, 0, columns.count).to(wide(logits));
  const auto [column, here] = column_of(labels, columns);
  const auto maximum = real.amax(1);
  const auto target = real.gather(1, column.unsqueeze(1)).squeeze(1).masked_fill(here.logical_not(), 0);
  return {maximum, (real - maximum.unsqueeze(1)).exp_().sum(1), target};
}

void softmax_gradient_(const at::Tensor& logits, const at::Tensor& given_labels, VocabColumns columns,
                       const SoftmaxStatistics& statistics, const at::Tensor& weight) {
  const auto labels = given_labels.contiguous();
  if (const auto type = block_type(logits)) {
    const c10::DeviceGuard guard(logits.device());
    const SoftmaxStatistics readable{statistics.maximum.contiguous(), statistics.sum.contiguous(),
                                     statistics.target.contiguous()};
    const auto weights = weight.dim() == 0 ? weight : weight.to(at::kFloat).contiguous();
    auto p = arguments(logits, labels, columns, readable);
    set_weight(p, weights);
    cuda::cross_entropy_gradient(p, *type, current_stream(logits));
    return;
  }
  const auto local = logits.size(1);
  if (columns.count < local) logits.narrow(1, columns.count, local - columns.count).zero_();
  if (columns.count == 0) return;
  auto real = logits.narrow(1, 0, columns.count);
  const auto [column, here] = column_of(labels, columns);
  auto gradient = (real.to(wide(logits)) - statistics.maximum.unsqueeze(1)).exp_().div_(statistics.sum.unsqueeze(1));
  gradient.scatter_add_(1, column.unsqueeze(1), here.to(gradient.scalar_type()).neg_().unsqueeze(1));
  const auto rows = weight.to(gradient.scalar_type()).expand({logits.size(0)});
  gradient.mul_(rows.masked_fill(labels.lt(0), 0).unsqueeze(1));
  real.copy_(gradient);
}

SoftmaxStatistics softmax_statistics_and_gradient_(const at::Tensor& logits, const at::Tensor& given_labels,
                                                   VocabColumns columns, const at::Tensor& weight) {
  const auto labels = given_labels.contiguous();
  if (const auto type = block_type(logits)) {
    const c10::DeviceGuard guard(logits.device());
    auto statistics = empty_statistics(logits);
    auto p = arguments(logits, labels, columns, statistics);
    set_weight(p, weight);
    cuda::cross_entropy_both(p, *type, current_stream(logits));
    return statistics;
  }
  const auto statistics = softmax_statistics(logits, labels, columns);
  softmax_gradient_(logits, labels, columns, statistics, weight);
  return statistics;
}

}  // namespace mcore_bridge
