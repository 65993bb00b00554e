#include "parallel/group.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <mutex>
#include <numeric>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

#include "mcore_bridge/error.h"
#include "parallel/flight_recorder.h"

namespace mcore_bridge {

struct Group::Backend {
  c10::intrusive_ptr<c10d::ProcessGroup> process_group;
  std::shared_ptr<FlightRecorder> recorder;

  /// Runs an operation on record; a failure (a timeout, a peer that is gone) names it.
  template <class Work>
  void run(Operation operation, c10::IntArrayRef shape, const Work& work) const {
    const FlightRecorder::Scope scope(*recorder, operation, shape);
    try {
      work();
    } catch (const c10::Error& error) {
      failed(operation, shape, error.what_without_backtrace());
    } catch (const std::exception& error) {
      failed(operation, shape, error.what());
    }
  }
  [[noreturn]] void failed(Operation operation, c10::IntArrayRef shape, const char* why) const {
    fail<Error>(operation_name(operation), " of ", shape, " in group ", recorder->description(), ": ", why);
  }
};

Group::Transfer::Transfer(c10::intrusive_ptr<c10d::Work> work, at::Tensor tensor)
    : work_(std::move(work)), tensor_(std::move(tensor)) {}

Group::Transfer::~Transfer() {
  if (!work_) return;
  // Nobody waited: an error is on its way up, and waiting for a peer that may be gone would keep it from getting there.
  // The back end may still touch the tensor, so it lives as long as the process.
  static std::mutex mutex;
  static auto& abandoned = *new std::vector<std::pair<c10::intrusive_ptr<c10d::Work>, at::Tensor>>;
  const std::lock_guard lock(mutex);
  abandoned.emplace_back(std::move(work_), std::move(tensor_));
}

void Group::Transfer::wait() {
  if (!work_) return;
  work_->wait();
  work_.reset();
  tensor_.reset();
}

Group::Group(c10::intrusive_ptr<c10d::ProcessGroup> backend, std::vector<int> ranks, int rank,
             std::optional<GroupKind> kind)
    : backend_(std::make_shared<Backend>(Backend{std::move(backend), FlightRecorder::create(kind, ranks)})),
      ranks_(std::move(ranks)),
      rank_(rank),
      kind_(kind) {
  MCB_CHECK(rank_ >= 0 && rank_ < size(), "Group: rank ", rank_, " is not a place in a group of ", size());
  MCB_CHECK(backend_->process_group->getSize() == size(), "Group: the process group has ",
            backend_->process_group->getSize(), " ranks, its rank list ", size());
}

Group Group::planned(std::vector<int> ranks, int rank) {
  Group group;
  group.ranks_ = std::move(ranks);
  group.rank_ = rank;
  return group;
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

void Group::count(Operation operation, int64_t bytes, bool root) const {
  // The pipeline's two directions are one dimension.
  const auto kind = kind_ == GroupKind::kPipelineBack ? GroupKind::kPipeline : kind_;
  count_communication(kind, operation, bytes, size(), root);
}

void Group::all_reduce(at::Tensor& tensor) const {
  if (size() == 1) return;
  count(Operation::kAllReduce, tensor.nbytes());
  backend_->run(Operation::kAllReduce, tensor.sizes(),
                [&] { reduce(*backend_->process_group, tensor, c10d::ReduceOp::SUM); });
}

void Group::all_reduce_max(at::Tensor& tensor) const {
  if (size() == 1) return;
  count(Operation::kAllReduce, tensor.nbytes());
  backend_->run(Operation::kAllReduce, tensor.sizes(),
                [&] { reduce(*backend_->process_group, tensor, c10d::ReduceOp::MAX); });
}

at::Tensor Group::all_gather(const at::Tensor& input) const {
  if (size() == 1) return input;
  auto contiguous = input.contiguous();
  auto sizes = contiguous.sizes().vec();
  MCB_CHECK(!sizes.empty(), "all_gather: a scalar has no dimension to gather along");
  sizes[0] *= size();
  auto output = at::empty(sizes, contiguous.options());
  count(Operation::kAllGather, output.nbytes());
  backend_->run(Operation::kAllGather, contiguous.sizes(),
                [&] { backend_->process_group->_allgather_base(output, contiguous)->wait(); });
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
  count(Operation::kReduceScatter, contiguous.nbytes());
  backend_->run(Operation::kReduceScatter, contiguous.sizes(),
                [&] { backend_->process_group->_reduce_scatter_base(output, contiguous)->wait(); });
  return output;
}

at::Tensor Group::all_to_all(const at::Tensor& input) const {
  if (size() == 1) return input;
  auto contiguous = input.contiguous();
  MCB_CHECK(contiguous.dim() > 0 && contiguous.size(0) % size() == 0, "all_to_all: dim 0 of ", contiguous.sizes(),
            " does not divide by the ", size(), " ranks of the group");
  auto output = at::empty_like(contiguous);
  count(Operation::kAllToAll, contiguous.nbytes());
  std::vector<int64_t> equal;  // empty: equal parts
  backend_->run(Operation::kAllToAll, contiguous.sizes(),
                [&] { backend_->process_group->alltoall_base(output, contiguous, equal, equal)->wait(); });
  return output;
}

void Group::broadcast(at::Tensor& tensor, int root) const {
  if (size() == 1) return;
  count(Operation::kBroadcast, tensor.nbytes(), root == rank_);
  TORCH_INTERNAL_ASSERT(tensor.is_contiguous());
  std::vector<at::Tensor> tensors{tensor};
  c10d::BroadcastOptions options;
  options.rootRank = root;
  backend_->run(Operation::kBroadcast, tensor.sizes(),
                [&] { backend_->process_group->broadcast(tensors, options)->wait(); });
}

void Group::barrier() const {
  if (size() == 1) return;
  count(Operation::kBarrier, 0);
  backend_->run(Operation::kBarrier, {}, [&] { backend_->process_group->barrier()->wait(); });
}

namespace {

using Works = std::vector<c10::intrusive_ptr<c10d::Work>>;

class PendingWorks : public Group::Pending {
 public:
  PendingWorks(Works sends, Works receives, std::vector<at::Tensor> tensors)
      : sends_(std::move(sends)), receives_(std::move(receives)), tensors_(std::move(tensors)) {}
  ~PendingWorks() override {
    for (auto* works : {&receives_, &sends_}) {
      for (auto& work : *works) {
        try {
          work->wait();
        } catch (...) {  // the failure surfaces in the next collective; a destructor must not throw
        }
      }
    }
  }
  void wait() override {
    for (auto& work : receives_) work->wait();
    receives_.clear();
  }

 private:
  Works sends_, receives_;
  std::vector<at::Tensor> tensors_;
};

}  // namespace

std::shared_ptr<Group::Pending> Group::start_all_reduce(const at::Tensor& tensor) const {
  if (size() == 1) return nullptr;
  TORCH_INTERNAL_ASSERT(tensor.is_contiguous());
  count(Operation::kAllReduce, tensor.nbytes());
  std::vector<at::Tensor> tensors{tensor};
  return std::make_shared<PendingWorks>(Works{}, Works{backend_->process_group->allreduce(tensors)}, tensors);
}

std::shared_ptr<Group::Pending> Group::start_reduce_scatter(const at::Tensor& output, const at::Tensor& input) const {
  if (size() == 1) return nullptr;
  TORCH_INTERNAL_ASSERT(input.is_contiguous() && output.is_contiguous() && output.numel() * size() == input.numel());
  count(Operation::kReduceScatter, input.nbytes());
  auto to = output, from = input;
  return std::make_shared<PendingWorks>(Works{}, Works{backend_->process_group->_reduce_scatter_base(to, from)},
                                        std::vector<at::Tensor>{output, input});
}

std::shared_ptr<Group::Pending> Group::start_all_gather(const at::Tensor& output, const at::Tensor& input) const {
  if (size() == 1) return nullptr;
  TORCH_INTERNAL_ASSERT(input.is_contiguous() && output.is_contiguous() && input.numel() * size() == output.numel());
  count(Operation::kAllGather, output.nbytes());
  auto to = output, from = input;
  return std::make_shared<PendingWorks>(Works{}, Works{backend_->process_group->_allgather_base(to, from)},
                                        std::vector<at::Tensor>{output, input});
}

std::shared_ptr<Group::Pending> Group::start_all_to_all(const at::Tensor& output, const at::Tensor& input,
                                                        const std::vector<int64_t>& send,
                                                        const std::vector<int64_t>& receive) const {
  if (size() == 1) return nullptr;
  const auto rows = [](const std::vector<int64_t>& parts) {
    return std::accumulate(parts.begin(), parts.end(), int64_t{0});
  };
  TORCH_INTERNAL_ASSERT(std::ssize(send) == size() && std::ssize(receive) == size() && input.is_contiguous() &&
                        output.is_contiguous() && rows(send) == input.size(0) && rows(receive) == output.size(0));
  count(Operation::kAllToAll, input.nbytes());
  auto to = output, from = input;
  auto to_parts = receive, from_parts = send;
  return std::make_shared<PendingWorks>(Works{},
                                        Works{backend_->process_group->alltoall_base(to, from, to_parts, from_parts)},
                                        std::vector<at::Tensor>{output, input});
}

std::shared_ptr<Group::Pending> Group::start_exchange(std::vector<Message> messages) const {
  if (messages.empty()) return nullptr;
  TORCH_INTERNAL_ASSERT(size() > 1);
  auto& group = *backend_->process_group;
  const auto device = messages.front().tensor.device().type();
  // NCCL runs messages of one pair in the order they are posted: one coalesced group lets opposite directions pass.
  const bool coalesce = device == c10::DeviceType::CUDA;
  Works sends, receives;
  std::vector<at::Tensor> alive;
  if (coalesce) group.startCoalescing(device);
  for (auto& message : messages) {
    TORCH_INTERNAL_ASSERT(message.tensor.is_contiguous());
    alive.push_back(message.tensor);
    std::vector<at::Tensor> tensors{message.tensor};
    count(message.send ? Operation::kSend : Operation::kReceive, message.tensor.nbytes());
    auto work = message.send ? group.send(tensors, message.peer, 0) : group.recv(tensors, message.peer, 0);
    if (work && !coalesce) (message.send ? sends : receives).push_back(std::move(work));
  }
  if (coalesce) {
    if (auto work = group.endCoalescing(device)) receives.push_back(std::move(work));
  }
  return std::make_shared<PendingWorks>(std::move(sends), std::move(receives), std::move(alive));
}

std::shared_ptr<Group::Pending> Group::start_broadcasts(std::vector<std::pair<at::Tensor, int>> tensors) const {
  if (tensors.empty() || size() == 1) return nullptr;
  Works works;
  std::vector<at::Tensor> alive;
  for (auto& [tensor, root] : tensors) {
    TORCH_INTERNAL_ASSERT(tensor.is_contiguous());
    count(Operation::kBroadcast, tensor.nbytes(), root == rank_);
    alive.push_back(tensor);
    std::vector<at::Tensor> one{tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    options.asyncOp = true;
    works.push_back(backend_->process_group->broadcast(one, options));
  }
  return std::make_shared<PendingWorks>(Works{}, std::move(works), std::move(alive));
}

std::shared_ptr<Group::Pending> Group::exchange(std::vector<Message> messages) const {
  if (messages.empty()) return nullptr;
  const auto operation = messages.front().send ? Operation::kSend : Operation::kReceive;
  const auto shape = messages.front().tensor.sizes().vec();
  std::shared_ptr<Pending> pending;
  backend_->run(operation, shape, [&] {
    pending = start_exchange(std::move(messages));
    pending->wait();
  });
  return pending;
}

std::shared_ptr<Group::Transfer> Group::send(at::Tensor tensor, int peer, uint32_t tag) const {
  TORCH_INTERNAL_ASSERT(size() > 1 && tensor.is_contiguous());
  count(Operation::kSend, tensor.nbytes());
  std::vector<at::Tensor> tensors{tensor};
  auto work = backend_->process_group->send(tensors, peer, static_cast<int>(tag));
  return std::make_shared<Transfer>(std::move(work), std::move(tensor));
}

std::shared_ptr<Group::Transfer> Group::receive(at::Tensor tensor, int peer, uint32_t tag) const {
  TORCH_INTERNAL_ASSERT(size() > 1 && tensor.is_contiguous());
  count(Operation::kReceive, tensor.nbytes());
  std::vector<at::Tensor> tensors{tensor};
  auto work = backend_->process_group->recv(tensors, peer, static_cast<int>(tag));
  return std::make_shared<Transfer>(std::move(work), std::move(tensor));
}

}  // namespace mcore_bridge
