#include "layers/overlapped_matmul.h"

#include <ATen/ATen.h>

#include <optional>

#include "parallel/travelling.h"

namespace mcore_bridge {
namespace {

/// all_gather(x) in steps: after step i the block of rank - i - 1 is there too.
class Gathering {
 public:
  Gathering(const Group& group, const at::Tensor& x, at::Tensor* whole)
      : group_(group), rows_(x.size(0)), whole_(whole), block_(group, x.contiguous()) {
    if (whole_) *whole_ = at::empty({group.size() * rows_, x.size(1)}, x.options());
  }
  const at::Tensor& block() const { return block_.here(); }
  int64_t first_row(int step) const { return (group_.rank() - step + group_.size()) % group_.size() * rows_; }
  void start(int step) {
    if (step + 1 < group_.size()) block_.send();
  }
  void finish(int step) {
    if (whole_) whole_->narrow(0, first_row(step), rows_).copy_(block());
    if (step + 1 < group_.size()) block_.arrive();
  }

 private:
  const Group& group_;
  int64_t rows_;
  at::Tensor* whole_;
  Travelling block_;
};

}  // namespace

at::Tensor gather_matmul(const at::Tensor& x, const at::Tensor& w, const at::Tensor& bias, const Group& group,
                         at::Tensor* gathered) {
  auto y = at::empty({group.size() * x.size(0), w.size(0)}, x.options());
  const auto wt = w.t();
  Gathering gathering(group, x, gathered);
  for (int step = 0; step < group.size(); ++step) {
    gathering.start(step);
    auto out = y.narrow(0, gathering.first_row(step), x.size(0));
    bias.defined() ? at::addmm_out(out, bias, gathering.block(), wt) : at::mm_out(out, gathering.block(), wt);
    gathering.finish(step);
  }
  return y;
}

at::Tensor matmul_reduce_scatter(const at::Tensor& x, const at::Tensor& w, const at::Tensor& addend, const Group& group,
                                 const at::Tensor& beside, at::Tensor* gathered) {
  const int size = group.size(), rank = group.rank();
  const auto rows = x.size(0) / size;
  const auto wt = w.t();
  std::optional<Gathering> gathering;
  if (gathered) gathering.emplace(group, beside, gathered);
  Travelling sum(group);
  for (int step = 0;; ++step) {
    if (gathering) gathering->start(step);
    // The block that still has the longest way to go comes first, this rank's own last.
    const auto first = (rank - 1 - step + 2 * size) % size * rows;
    const auto block = x.narrow(0, first, rows);
    auto part = addend.defined() ? at::addmm(addend.narrow(0, first, rows), block, wt) : at::mm(block, wt);
    if (step > 0) {
      sum.arrive();
      part.add_(sum.here());
    }
    if (gathering) gathering->finish(step);
    if (step + 1 == size) return part;
    sum.send(std::move(part));
  }
}

}  // namespace mcore_bridge
