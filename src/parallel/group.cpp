#include "parallel/group.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "mcore_bridge/error.h"

namespace mcore_bridge {

struct Group::Backend {
  c10::intrusive_ptr<c10d::ProcessGroup> process_group;
};

/// Sends must outlive the call that started them; the tensors are held until the works are done.
class Group::Pending {
 public:
  Pending(std::vector<c10::intrusive_ptr<c10d::Work>> works, std::vector<at::Tensor> tensors)
      : works_(std::move(works)), tensors_(std::move(tensors)) {}
  ~Pending() {
    for (auto& work : works_) {
      try {
        work->wait();
      } catch (...) {  // the failure surfaces in the next collective; a destructor must not throw
      }
    }
  }

 private:
  std::vector<c10::intrusive_ptr<c10d::Work>> works_;
  std::vector<at::Tensor> tensors_;
};

Group::Group(c10::intrusive_ptr<c10d::ProcessGroup> backend, std::vector<int> ranks, int rank)
    : backend_(std::make_shared<Backend>(Backend{std::move(backend)})), ranks_(std::move(ranks)), rank_(rank) {
  MCB_CHECK(rank_ >= 0 && rank_ < size(), "Group: rank ", rank_, " is not a place in a group of ", size());
  MCB_CHECK(backend_->process_group->getSize() == size(), "Group: the process group has ",
            backend_->process_group->getSize(), " ranks, its rank list ", size());
}

namespace {

void reduce(c10d::ProcessGroup& group, at::Tensor& tensor, c10d::ReduceOp::RedOpType op) {
  TORCH_INTERNAL_ASSERT(tensor.is_contiguous());
  std::vector<at::Tensor> tensors{tensor};
  c10d::AllreduceOptions options;
  options.reduceOp = op;
  group.allreduce(tensors, options)->wait();
}

}  // namespace

void Group::all_reduce(at::Tensor& tensor) const {
  if (size() > 1) reduce(*backend_->process_group, tensor, c10d::ReduceOp::SUM);
}

void Group::all_reduce_max(at::Tensor& tensor) const {
  if (size() > 1) reduce(*backend_->process_group, tensor, c10d::ReduceOp::MAX);
}

at::Tensor Group::all_gather(const at::Tensor& input) const {
  if (size() == 1) return input;
  auto contiguous = input.contiguous();
  auto sizes = contiguous.sizes().vec();
  MCB_CHECK(!sizes.empty(), "all_gather: a scalar has no dimension to gather along");
  sizes[0] *= size();
  auto output = at::empty(sizes, contiguous.options());
  backend_->process_group->_allgather_base(output, contiguous)->wait();
  return output;
}

at::Tensor Group::reduce_scatter(const at::Tensor& input) const {
  if (size() == 1) return input;
  auto contiguous = input.contiguous();
  auto sizes = contiguous.sizes().vec();
  MCB_CHECK(!sizes.empty() && sizes[0] % size() == 0, "reduce_scatter: dim 0 of ", contiguous.sizes(),
            " does not divide by the ", size(), " ranks of the group");
  sizes[0] /= size();
  auto output = at::empty(sizes, contiguous.options());
  backend_->process_group->_reduce_scatter_base(output, contiguous)->wait();
  return output;
}

void Group::broadcast(at::Tensor& tensor, int root) const {
  if (size() == 1) return;
  TORCH_INTERNAL_ASSERT(tensor.is_contiguous());
  std::vector<at::Tensor> tensors{tensor};
  c10d::BroadcastOptions options;
  options.rootRank = root;
  backend_->process_group->broadcast(tensors, options)->wait();
}

void Group::barrier() const {
  if (size() > 1) backend_->process_group->barrier()->wait();
}

std::shared_ptr<Group::Pending> Group::exchange(std::vector<Message> messages) const {
  if (messages.empty()) return nullptr;
  TORCH_INTERNAL_ASSERT(size() > 1);
  auto& group = *backend_->process_group;
  const auto device = messages.front().tensor.device().type();
  // NCCL runs messages of one pair in the order they are posted: one coalesced group lets opposite directions pass.
  const bool coalesce = device == c10::DeviceType::CUDA;
  std::vector<c10::intrusive_ptr<c10d::Work>> sends, receives;
  std::vector<at::Tensor> alive;
  if (coalesce) group.startCoalescing(device);
  for (auto& message : messages) {
    TORCH_INTERNAL_ASSERT(message.tensor.is_contiguous());
    alive.push_back(message.tensor);
    std::vector<at::Tensor> tensors{message.tensor};
    auto work = message.send ? group.send(tensors, message.peer, 0) : group.recv(tensors, message.peer, 0);
    if (work) (message.send ? sends : receives).push_back(std::move(work));
  }
  if (coalesce) {
    if (auto work = group.endCoalescing(device)) work->wait();
    return nullptr;
  }
  for (auto& work : receives) work->wait();
  return sends.empty() ? nullptr : std::make_shared<Pending>(std::move(sends), std::move(alive));
}

}  // namespace mcore_bridge
