// A tensor on its way around the ranks of a group.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <memory>
#include <utility>

#include "parallel/group.h"

namespace mcore_bridge {

/// Every rank holds one; `send` starts handing it (or another of its shape) to the next rank while the previous rank's
/// comes in, `arrive` waits for that one, which then is `here`. What is computed in between overlaps the transfer.
class Travelling {
 public:
  explicit Travelling(const Group& group, at::Tensor start = {}) : group_(group), here_(std::move(start)) {}
  const at::Tensor& here() const { return here_; }
  void send(at::Tensor tensor) {
    coming_ = at::empty_like(tensor);
    const int size = group_.size(), rank = group_.rank();
    pending_ = group_.start_exchange(
        {{std::move(tensor), (rank + 1) % size, true}, {coming_, (rank + size - 1) % size, false}});
  }
  void send() { send(here_); }
  void arrive() {
    pending_->wait();
    sent_ = std::move(pending_);  // its buffer is given up only when the next one has arrived
    here_ = std::move(coming_);
  }

 private:
  const Group& group_;
  at::Tensor here_, coming_;
  std::shared_ptr<Group::Pending> pending_, sent_;
};

}  // namespace mcore_bridge
