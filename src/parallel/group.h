// One process group as the engine sees it. With one rank every operation is a no-op and no backend exists.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

namespace c10d {
class ProcessGroup;
}

namespace mcore_bridge {

/// Cheap to copy. Collectives block the host only on CPU backends; on CUDA they order themselves on the current stream.
/// Every call is matched by the same call on all members, in the same order.
class Group {
 public:
  Group() = default;  ///< a group of one
  Group(c10::intrusive_ptr<c10d::ProcessGroup> backend, std::vector<int> ranks, int rank);

  int size() const { return static_cast<int>(ranks_.size()); }
  int rank() const { return rank_; }                        ///< this process's place in the group
  const std::vector<int>& ranks() const { return ranks_; }  ///< global ranks

  void all_reduce(at::Tensor& tensor) const;      ///< sum, in place; tensor contiguous
  void all_reduce_max(at::Tensor& tensor) const;  ///< max, in place
  /// Concatenates every member's `input` along dim 0 (all the same shape).
  at::Tensor all_gather(const at::Tensor& input) const;
  /// Sums over members and returns this member's 1/size of dim 0 (which size must divide).
  at::Tensor reduce_scatter(const at::Tensor& input) const;
  void broadcast(at::Tensor& tensor, int root /* place in the group */) const;
  void barrier() const;

  /// One round of point-to-point messages that must not wait for one another: all sends and receives are started, then
  /// the receives are waited for. Sends are kept alive by the returned handle (drop it to wait for them).
  struct Message {
    at::Tensor tensor;
    int peer;  ///< place in the group
    bool send;
  };
  class Pending;  ///< sends still under way
  std::shared_ptr<Pending> exchange(std::vector<Message> messages) const;

 private:
  struct Backend;  // keeps c10d's headers out of here
  std::shared_ptr<Backend> backend_;
  std::vector<int> ranks_{0};
  int rank_ = 0;
};

}  // namespace mcore_bridge
