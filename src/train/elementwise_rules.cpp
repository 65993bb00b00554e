// AdamW (https://arxiv.org/abs/1711.05101) and SGD with momentum, over libtorch's fused kernels.
#include <ATen/ATen.h>

#include <algorithm>
#include <functional>
#include <tuple>

#include "kernels/adamw.h"
#include "kernels/param_remainder.h"
#include "train/update_rule.h"

namespace mcore_bridge {
namespace {

/// Parallel lists of tensors, as fused kernels take them: masters, gradients, then each state.
using Lists = std::vector<std::vector<at::Tensor>>;
using Row = std::vector<at::Tensor>;  ///< one of each

/// Elements converted at a time when a kernel does not take a dtype: few launches on a GPU, what caches hold on a CPU.
int64_t staged_elements(const at::Tensor& tensor) { return tensor.is_cpu() ? 1 << 18 : 8 << 20; }

Row row_of(const Segment& segment) {
  Row row{segment.remainder.defined() ? segment.remainder : segment.master, segment.gradient()};
  for (const auto& [kind, tensor] : segment.states) row.push_back(tensor);
  return row;
}

bool all_fp32(const Row& row) {
  return std::all_of(row.begin(), row.end(), [](const auto& tensor) { return tensor.scalar_type() == at::kFloat; });
}

/// Calls `kernel` on the tensors themselves where it `takes` their dtypes (then with their segments), else on fp32
/// copies of a part at a time, which go back after (without).
void staged(const std::vector<Segment*>& segments, bool (*takes)(const Row&),
            const std::function<void(Lists&, const std::vector<const Segment*>&)>& kernel) {
  Lists direct;
  std::vector<const Segment*> whole;
  for (const auto* segment : segments) {
    const auto row = row_of(*segment);
    direct.resize(row.size());
    if (takes(row)) {
      for (size_t i = 0; i < row.size(); ++i) direct[i].push_back(row[i]);
      whole.push_back(segment);
      continue;
    }
    const bool split = segment->remainder.defined();
    const auto most = staged_elements(row[0]);
    for (int64_t at = 0; at < row[0].numel(); at += most) {
      const auto length = std::min(most, row[0].numel() - at);
      auto part = [&](const at::Tensor& tensor) { return tensor.narrow(0, at, length); };
      Lists copies(row.size());
      for (size_t i = 0; i < row.size(); ++i) {
        copies[i].push_back(i == 0 && split ? join_master(part(segment->parameter), part(row[0]))
                                            : part(row[i]).to(at::kFloat));
      }
      kernel(copies, {});
      if (split) split_master(copies[0][0], part(segment->parameter), part(row[0]));
      for (size_t i = 0; i < row.size(); ++i) {
        const bool same = row[i].scalar_type() == at::kFloat || i == 1 || (i == 0 && split);
        if (!same) part(row[i]).copy_(copies[i][0]);
      }
    }
  }
  if (!whole.empty()) kernel(direct, whole);
}

/// Segments with the same learning rate and weight decay go together.
template <class Kernel>
void by_group(const std::vector<Segment*>& segments, const Update& update, bool (*takes)(const Row&),
              const Kernel& kernel) {
  std::map<std::pair<double, bool>, std::vector<Segment*>> groups;
  for (auto* segment : segments) groups[{segment->lr_mult, segment->decays}].push_back(segment);
  for (const auto& [group, members] : groups) {
    const double lr = update.lr * group.first, decay = group.second ? update.weight_decay : 0.0;
    staged(members, takes, [&](Lists& lists, const auto& whole) { kernel(lists, whole, lr, decay); });
  }
}

class AdamW : public UpdateRule {
 public:
  explicit AdamW(const OptimizerOptions& options)
      : beta1_(options.adam_beta1),
        beta2_(options.adam_beta2),
        epsilon_(options.adam_eps),
        kinds_{{"exp_avg", precision(options.exp_avg_dtype)}, {"exp_avg_sq", precision(options.exp_avg_sq_dtype)}} {}
  std::vector<std::pair<std::string, at::ScalarType>> kinds() const override { return kinds_; }
  void apply(const std::vector<Segment*>& segments, const Update& update) const override {
    by_group(segments, update, fused_adamw_takes, [&](Lists& lists, const auto& whole, double lr, double decay) {
      std::vector<at::Tensor> parameters(lists[0].size());
      for (size_t i = 0; i < whole.size(); ++i) {
        if (writes_parameter(*whole[i])) parameters[i] = whole[i]->parameter;
      }
      fused_adamw({lists[0], lists[1], lists[2], lists[3], parameters},
                  {.lr = lr, .beta1 = beta1_, .beta2 = beta2_, .epsilon = epsilon_, .weight_decay = decay},
                  update.grad_scale, update.skip, update.steps);
    });
  }
  bool writes_parameter(const Segment& segment) const override {
    if (segment.remainder.defined()) return true;
    if (!segment.has_copy() || segment.on_host) return false;
    auto tensors = row_of(segment);
    tensors.push_back(segment.parameter);
    return fused_adamw_takes(tensors);
  }

 private:
  double beta1_, beta2_, epsilon_;
  std::vector<std::pair<std::string, at::ScalarType>> kinds_;
};

class Sgd : public UpdateRule {
 public:
  explicit Sgd(const OptimizerOptions& options)
      : momentum_(options.sgd_momentum), dtype_(precision(options.exp_avg_dtype)) {}
  std::vector<std::pair<std::string, at::ScalarType>> kinds() const override {
    if (momentum_ == 0) return {};
    return {{"momentum_buffer", dtype_}};
  }
  void apply(const std::vector<Segment*>& segments, const Update& update) const override {
    by_group(segments, update, all_fp32, [&](Lists& lists, const auto&, double lr, double decay) {
      const auto momenta = momentum_ == 0 ? std::vector<at::Tensor>{} : lists[2];
      // A zero buffer is what a first step starts from.
      at::_fused_sgd_(lists[0], lists[1], momenta, decay, momentum_, lr, /*dampening=*/0, /*nesterov=*/false,
                      /*maximize=*/false, /*is_first_step=*/false, update.grad_scale, update.skip);
    });
  }

 private:
  double momentum_;
  at::ScalarType dtype_;
};

}  // namespace

std::unique_ptr<UpdateRule> make_adamw(const OptimizerOptions& options) { return std::make_unique<AdamW>(options); }
std::unique_ptr<UpdateRule> make_sgd(const OptimizerOptions& options) { return std::make_unique<Sgd>(options); }

at::ScalarType precision(const std::string& name) {
  return name == "bf16" ? at::kBFloat16 : name == "fp16" ? at::kHalf : at::kFloat;
}

}  // namespace mcore_bridge
