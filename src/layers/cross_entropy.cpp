#include "layers/cross_entropy.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <utility>

#include "kernels/cross_entropy.h"
#include "layers/main_gradient.h"

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

constexpr int64_t kIgnore = -100;

/// The real columns of a rank that holds `local` of them, padding included.
VocabColumns columns_of(int64_t local, int64_t vocab_size, const Group& group) {
  const auto first = group.rank() * local;
  return {.first = first, .count = std::clamp<int64_t>(vocab_size - first, 0, local)};
}

/// Statistics of the whole vocabulary from each rank's.
void join(SoftmaxStatistics& statistics, const Group& group) {
  if (group.size() == 1) return;
  auto maximum = statistics.maximum.contiguous().clone();
  group.all_reduce_max(maximum);
  auto sums = at::stack({statistics.sum * (statistics.maximum - maximum).exp_(), statistics.target});
  group.all_reduce(sums);
  statistics = {maximum, sums[0], sums[1]};
}

at::Tensor losses_of(const SoftmaxStatistics& statistics, const at::Tensor& labels) {
  return (statistics.sum.log() + statistics.maximum).sub_(statistics.target).masked_fill_(labels.eq(kIgnore), 0);
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& logits, const at::Tensor& labels,
                            int64_t vocab_size, const Group* group) {
    const auto matrix = logits.reshape({labels.numel(), logits.size(-1)}).contiguous();
    const auto targets = labels.reshape({-1});
    const auto columns = columns_of(logits.size(-1), vocab_size, *group);
    auto statistics = softmax_statistics(matrix, targets, columns);
    join(statistics, *group);
    context->save_for_backward({matrix, targets, statistics.maximum, statistics.sum, statistics.target});
    context->saved_data["first"] = columns.first;
    context->saved_data["count"] = columns.count;
    return losses_of(statistics, targets).reshape(labels.sizes());
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    auto sizes = grads[0].sizes().vec();
    sizes.push_back(saved[0].size(1));
    const auto grad = saved[0].clone();
    softmax_gradient_(grad, saved[1], {context->saved_data["first"].toInt(), context->saved_data["count"].toInt()},
                      {saved[2], saved[3], saved[4]}, grads[0].reshape({-1}));
    return {grad.view(sizes), Variable(), Variable(), Variable()};
  }
};

constexpr int64_t kChunkBytes = int64_t{512} << 20;  // of logits that exist at a time

/// Rows of a chunk: even chunks, of a multiple of 128 rows for the matrix products.
int64_t chunk_rows(int64_t rows, int64_t row_bytes) {
  const auto most = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, row_bytes));
  const auto chunks = (rows + most - 1) / most, even = (rows + chunks - 1) / chunks;
  return std::min(rows, (even + 127) / 128 * 128);
}

struct Holder : torch::CustomClassHolder {
  Holder(Group g, std::shared_ptr<MainGradient> m) : group(std::move(g)), main(std::move(m)) {}
  Group group;
  std::shared_ptr<MainGradient> main;  ///< of the weight
};

struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x_sbh, const at::Tensor& weight,
                            const at::Tensor& labels, const LinearCrossEntropyOptions* options, const Group* group,
                            bool wants_x, bool wants_weight) {
    const bool scattered = options->sequence_parallel && group->size() > 1;
    const auto input = scattered ? group->all_gather(x_sbh) : x_sbh;
    const auto x = input.reshape({-1, input.size(-1)}).contiguous();
    const auto targets = labels.reshape({-1}).contiguous();
    const auto rows = x.size(0), local = weight.size(0);
    const auto columns = columns_of(local, options->vocab_size, *group);
    // Low precision sums over chunks in fp32.
    const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const auto main = wants_weight ? main_gradient(weight) : nullptr;
    const bool direct = main && main->grad.scalar_type() == wide;
    at::Tensor grad_x, grad_weight;
    if (wants_x) grad_x = at::empty(x.sizes(), x.options());
    if (wants_weight) grad_weight = direct ? main->grad : at::empty(weight.sizes(), weight.options().dtype(wide));
    bool fresh = !direct || main->fresh;
    auto loss = at::zeros({}, x.options().dtype(at::kDouble));
    const auto step = chunk_rows(rows, local * x.element_size());
    const auto buffer = at::empty({step, local}, x.options());
    for (int64_t first = 0; first < rows; first += step) {
      const auto count = std::min(step, rows - first);
      const auto part = x.narrow(0, first, count), label = targets.narrow(0, first, count);
      auto logits = buffer.narrow(0, 0, count);
      at::mm_out(logits, part, weight.t());
      SoftmaxStatistics statistics;
      const bool gradients = wants_x || wants_weight;
      if (group->size() == 1 && gradients) {
        statistics = softmax_statistics_and_gradient_(logits, label, columns, options->loss_weight);
      } else {
        statistics = softmax_statistics(logits, label, columns);
        join(statistics, *group);
        if (gradients) softmax_gradient_(logits, label, columns, statistics, options->loss_weight);
      }
      loss.addcmul_(losses_of(statistics, label).sum(at::kDouble), options->loss_weight);
      if (wants_x) {
        auto grad = grad_x.narrow(0, first, count);
        at::mm_out(grad, logits, weight);
      }
      if (wants_weight) accumulate_product(grad_weight, logits, part, !std::exchange(fresh, false));
    }
    if (wants_x) grad_x = grad_x.view(input.sizes());
    if (main) {
      if (!direct) main->fresh ? main->grad.copy_(grad_weight) : main->grad.add_(grad_weight);
      main->fresh = false;
      grad_weight.reset();
    }
    if (grad_weight.defined()) grad_weight = grad_weight.to(weight.scalar_type());
    context->save_for_backward({grad_x, grad_weight});
    context->saved_data["scattered"] = scattered;
    context->saved_data["holder"] = at::IValue::make_capsule(c10::make_intrusive<Holder>(*group, main));
    return loss;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto capsule = context->saved_data["holder"].toCapsule();
    const auto* holder = static_cast<const Holder*>(capsule.get());
    const auto& group = holder->group;
    variable_list result(7);
    if (context->needs_input_grad(0)) {
      auto grad = saved[0];
      if (context->saved_data["scattered"].toBool()) {
        grad = group.reduce_scatter(grad);
      } else {
        group.all_reduce(grad);
      }
      result[0] = grad;
    }
    if (holder->main) holder->main->added = true;
    if (context->needs_input_grad(1)) result[1] = saved[1];  // none: it is in the main gradient
    return result;
  }
};

}  // namespace

at::Tensor vocab_parallel_cross_entropy(const at::Tensor& logits_sbv, const at::Tensor& labels_sb, int64_t vocab_size,
                                        const Group& group) {
  return CrossEntropy::apply(logits_sbv, labels_sb, vocab_size, &group);
}

at::Tensor linear_cross_entropy(const at::Tensor& x_sbh, const at::Tensor& weight, const at::Tensor& labels_sb,
                                const LinearCrossEntropyOptions& options, const Group& group) {
  const bool grad = at::GradMode::is_enabled();
  return LinearCrossEntropy::apply(x_sbh, weight, labels_sb, &options, &group, grad && x_sbh.requires_grad(),
                                   grad && weight.requires_grad());
}

Footprint cross_entropy_footprint(int64_t columns, int tp, const ActivationShape& shape) {
  const auto rows = shape.tokens(), row = columns * shape.element;
  Footprint result;
  const auto chunk = shape.training_loss ? chunk_rows(rows, row) : rows;
  for (int64_t first = 0; first < rows; first += chunk) {
    const auto count = std::min(chunk, rows - first);
    result.tensor_forward += Traffic::all_reduce(count * 4, tp);      // maximum
    result.tensor_forward += Traffic::all_reduce(2 * count * 4, tp);  // sum of exponentials, the target's logit
  }
  // Without a kernel of its own the softmax runs in fp32: the scores, of low precision first a copy.
  const auto scores = shape.fused ? 0 : chunk * columns * (shape.element < 4 ? 8 : 4);
  if (shape.training_loss) {
    result.workspace = chunk * row + scores;
  } else {
    result.saved = rows * (row + 8 + 3 * 4);  // logits, target, statistics
    result.workspace = std::max(rows * row, scores);
  }
  return result;
}

}  // namespace mcore_bridge
