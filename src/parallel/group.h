// One process group as the engine sees it. With one rank every operation is a no-op and no backend exists.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "parallel/communication.h"

namespace c10d {
class ProcessGroup;
class Work;
}  // namespace c10d

namespace mcore_bridge {

/// Cheap to copy. Collectives block the host only on CPU backends; on CUDA they order themselves on the current stream.
/// Every call is matched by the same call on all members, in the same order.
class Group {
 public:
  Group() = default;  ///< a group of one
  /// `kind`: under which name its traffic is counted (mcore_bridge/communication.h); "other" without.
  Group(c10::intrusive_ptr<c10d::ProcessGroup> backend, std::vector<int> ranks, int rank,
        std::optional<GroupKind> kind = {});
  /// A group on paper: it has members, but nothing can be sent.
  static Group planned(std::vector<int> ranks, int rank);

  int size() const { return static_cast<int>(ranks_.size()); }
  int rank() const { return rank_; }                        ///< this process's place in the group
  const std::vector<int>& ranks() const { return ranks_; }  ///< global ranks

  void all_reduce(at::Tensor& tensor) const;      ///< sum, in place; tensor contiguous
  void all_reduce_max(at::Tensor& tensor) const;  ///< max, in place
  /// Concatenates every member's `input` along dim 0 (all the same shape).
  at::Tensor all_gather(const at::Tensor& input) const;
  /// Sums over members and returns this member's 1/size of dim 0 (which size must divide).
  at::Tensor reduce_scatter(const at::Tensor& input) const;
  /// Part i of dim 0 (which size must divide) goes to member i; returns the parts received, in member order.
  at::Tensor all_to_all(const at::Tensor& input) const;
  void broadcast(at::Tensor& tensor, int root /* place in the group */) const;
  void barrier() const;

  /// One round of point-to-point messages that must not wait for one another.
  struct Message {
    at::Tensor tensor;
    int peer;  ///< place in the group
    bool send;
  };
  /// Messages under way. Keeps their tensors alive; dropping it waits for all of them.
  class Pending {
   public:
    virtual ~Pending() = default;
    /// Until every receive has its data (CUDA: for the current stream). A failed message throws here.
    virtual void wait() = 0;
  };
  /// Collectives that do not wait: the output is whole after wait(); nothing comes back from a group of one. `output`
  /// of reduce_scatter may be this member's part of `input`, `input` of all_gather this member's part of `output`.
  std::shared_ptr<Pending> start_all_reduce(const at::Tensor& tensor) const;
  std::shared_ptr<Pending> start_reduce_scatter(const at::Tensor& output, const at::Tensor& input) const;
  std::shared_ptr<Pending> start_all_gather(const at::Tensor& output, const at::Tensor& input) const;
  /// Rows of dim 0 in unequal parts: the first `send[0]` rows of `input` go to member 0, the next `send[1]` to member
  /// 1,
  /// ...; `receive[i]` rows of `output` come from member i. Every pair must agree on its number, which may be 0.
  std::shared_ptr<Pending> start_all_to_all(const at::Tensor& output, const at::Tensor& input,
                                            const std::vector<int64_t>& send,
                                            const std::vector<int64_t>& receive) const;

  /// Starts all sends and receives and returns at once: received tensors are whole after wait().
  std::shared_ptr<Pending> start_exchange(std::vector<Message> messages) const;
  /// Starts a broadcast of every tensor (contiguous) from its root (a place in the group), in this order, and returns
  /// at once: tensors are whole after wait().
  std::shared_ptr<Pending> start_broadcasts(std::vector<std::pair<at::Tensor, int>> tensors) const;
  /// Starts all, waits for the receives; sends may still be under way.
  std::shared_ptr<Pending> exchange(std::vector<Message> messages) const;

  /// Point to point: both return at once; `wait` of the result when the tensor is needed (received) or reused (sent).
  /// `tensor` contiguous; `peer` a place in the group. Messages of a pair match by `tag` where the back end knows tags
  /// (Gloo), else by order (NCCL), so keep both alike. With NCCL a group carries a pair's messages one after the other:
  /// use one group per direction.
  class Transfer;
  std::shared_ptr<Transfer> send(at::Tensor tensor, int peer, uint32_t tag = 0) const;
  std::shared_ptr<Transfer> receive(at::Tensor tensor, int peer, uint32_t tag = 0) const;

 private:
  struct Backend;  // keeps c10d's headers out of here
  void count(Operation operation, int64_t bytes, bool root = false) const;
  std::shared_ptr<Backend> backend_;
  std::vector<int> ranks_{0};
  int rank_ = 0;
  std::optional<GroupKind> kind_;
};

/// A message under way; keeps its tensor alive.
class Group::Transfer {
 public:
  Transfer(c10::intrusive_ptr<c10d::Work> work, at::Tensor tensor);
  ~Transfer();
  Transfer(const Transfer&) = delete;
  Transfer& operator=(const Transfer&) = delete;
  /// CPU back ends: blocks the host. CUDA: orders the message before what follows on the current stream. Throws when
  /// the peer is gone or the time is up.
  void wait();

 private:
  c10::intrusive_ptr<c10d::Work> work_;
  at::Tensor tensor_;
};

}  // namespace mcore_bridge
