#include "layers/moe/dispatcher.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "layers/offload.h"
#include "mcore_bridge/error.h"
#include "parallel/collectives.h"

namespace mcore_bridge {
namespace {

int64_t sum(const std::vector<int64_t>& values) { return std::accumulate(values.begin(), values.end(), int64_t{0}); }

/// The largest of each number over the group. Host tensors: no wait for the device.
std::vector<int64_t> largest(const std::vector<int64_t>& values, const Group& group) {
  auto tensor = at::tensor(values, at::kLong);
  group.all_reduce_max(tensor);
  return {tensor.const_data_ptr<int64_t>(), tensor.const_data_ptr<int64_t>() + tensor.numel()};
}

at::Tensor with_more_rows(const at::Tensor& x, int64_t more, double fill) {
  return more == 0 ? x : at::constant_pad_nd(x, {0, 0, 0, more}, fill);
}

/// As many tokens as `count`, the new ones going nowhere.
void pad_tokens(at::Tensor& x, Routing& routing, int64_t count, int64_t experts) {
  const auto more = count - x.size(0);
  x = with_more_rows(x, more, 0);
  routing.experts = with_more_rows(routing.experts, more, static_cast<double>(experts));
  routing.weights = with_more_rows(routing.weights, more, 0);
}

}  // namespace

Dispatcher::Dispatcher(ParallelStatePtr parallel, Options options)
    : parallel_(std::move(parallel)), options_(options), local_(options.experts / parallel_->ep.size()) {
  const auto& etp = parallel_->etp.ranks();
  const auto& tp = parallel_->tp.ranks();
  same_tokens_ =
      std::all_of(etp.begin(), etp.end(), [&](int rank) { return std::find(tp.begin(), tp.end(), rank) != tp.end(); });
}

Dispatched Dispatcher::dispatch(const at::Tensor& x_th, Router::Output routed,
                                const std::function<void()>& meanwhile) const {
  const auto& etp = parallel_->etp;
  Dispatched d{.routing = std::move(routed.routing), .may_drop = routed.capacity > 0, .own_tokens = x_th.size(0)};
  auto capacity = options_.pad_to_capacity ? std::min(routed.capacity, d.own_tokens) : 0;
  auto x = x_th;
  if (etp.size() > 1) {
    if (!same_tokens_) {
      const auto agreed = largest({d.own_tokens, capacity}, etp);
      pad_tokens(x, d.routing, agreed[0], options_.experts);
      capacity = agreed[1];
      d.may_drop = true;
    }
    capacity *= etp.size();
    x = gather_sequence(x, etp);
    d.routing.experts = etp.all_gather(d.routing.experts);
    d.routing.weights = gather_sequence(d.routing.weights, etp);
  }
  d.shared_tokens = x.size(0);
  if (options_.kind == Kind::kAllToAll) {
    all_to_all(d, x, capacity, meanwhile);
  } else {
    all_gather(d, x);
    if (meanwhile) meanwhile();
  }
  return d;
}

at::Tensor Dispatcher::combine(const at::Tensor& y, const Dispatched& d) const {
  const auto& ep = parallel_->ep;
  at::Tensor tokens;
  if (ep.size() == 1) {
    tokens = unpermuted(y, d);
  } else if (options_.kind == Kind::kAllGather) {
    tokens = reduce_scatter_sequence(unpermuted(y, d), ep).narrow(0, 0, d.shared_tokens);
  } else {
    const auto home = exchange_rows(y.index_select(0, d.ungroup), d.received, d.sent, ep);
    // Dropped places went nowhere: zeros stand for them at the end.
    tokens = unpermuted(with_more_rows(home, d.permutation.order.size(0) - home.size(0), 0), d);
  }
  return reduce_scatter_sequence(tokens, parallel_->etp).narrow(0, 0, d.own_tokens);
}

DispatchFootprint Dispatcher::footprint(const DispatchLoad& load) const {
  constexpr int64_t kIndex = 8;
  const int64_t ep = parallel_->ep.size(), etp = parallel_->etp.size(), row = load.hidden * load.element;
  const bool gathers = options_.kind == Kind::kAllGather, exchanges = !gathers && ep > 1;
  const bool on_input = options_.weights_on_input;
  const auto capacity = options_.pad_to_capacity && !gathers ? std::min(load.capacity, load.tokens) * etp : 0;
  const auto shared = load.tokens * etp;
  DispatchFootprint result;
  result.tokens = shared * (gathers ? ep : 1);
  result.places = result.tokens * load.topk;
  result.permuted = capacity > 0 ? options_.experts * capacity : result.places;
  result.rows = exchanges && capacity == 0 ? load.kept * etp : result.permuted;
  result.computed = capacity > 0 ? result.rows : load.kept * etp;
  result.rows_grad = load.input_grad || (on_input && load.weights_grad);
  result.output_grad = result.rows_grad || load.experts_grad || load.weights_grad;
  const bool experts_out = result.rows_grad || load.experts_grad;  // what the experts make requires gradients

  auto& cost = result.cost;
  auto& saved = cost.saved;
  const auto order = kIndex * (result.permuted + (capacity > 0 ? 1 : 0)), inverse = kIndex * result.places;
  if (on_input) {
    if (load.weights_grad) saved += result.permuted * row;
    if (load.input_grad) saved += result.permuted * load.element;
    if (result.output_grad) saved += order + inverse;
  } else if (result.output_grad) {
    cost.offloaded = result.permuted * row;
    saved += result.permuted * row + result.places * load.weight_element + order + inverse;
  }
  if (exchanges) saved += kIndex * result.rows * ((result.rows_grad ? 1 : 0) + (experts_out ? 1 : 0));

  // Tokens, which experts, with which weights; backward the gradients of the first and the last.
  auto gather = [&](Traffic& forward, Traffic& backward, int64_t tokens, int64_t ranks) {
    const auto weights = tokens * load.topk * load.weight_element;
    forward += Traffic::all_gather(tokens * row, ranks);
    forward += Traffic::all_gather(weights, ranks);
    forward += Traffic::all_gather(tokens * load.topk * kIndex, ranks);
    forward += Traffic::reduce_scatter(tokens * row, ranks);
    if (load.input_grad) backward += Traffic::reduce_scatter(tokens * row, ranks);
    if (load.weights_grad) backward += Traffic::reduce_scatter(weights, ranks);
    if (result.output_grad) backward += Traffic::all_gather(tokens * row, ranks);
  };
  if (!same_tokens_) cost.experts_forward.expert_tensor += Traffic::all_reduce(2 * 8, etp);
  gather(cost.experts_forward.expert_tensor, cost.experts_backward.expert_tensor, shared, etp);
  auto &forward = cost.experts_forward.expert, &backward = cost.experts_backward.expert;
  if (gathers) {
    forward += Traffic::all_reduce(8, ep);
    gather(forward, backward, result.tokens, ep);
  } else {
    forward += capacity > 0 ? Traffic::all_gather(8 * ep, ep) : Traffic::all_to_all(8 * options_.experts, ep);
    const auto rows = Traffic::all_to_all(result.rows * row, ep);
    forward += rows * 2;
    if (result.rows_grad) backward += rows;
    if (experts_out) backward += rows;
  }
  return result;
}

at::Tensor Dispatcher::permuted(const at::Tensor& x_th, const Dispatched& d) const {
  const auto rows = permute_tokens(x_th, d.permutation);
  if (!options_.weights_on_input) return rows;
  return rows * by_row(d.routing.weights, d.permutation).unsqueeze(1).to(rows.scalar_type());
}

at::Tensor Dispatcher::unpermuted(const at::Tensor& rows, const Dispatched& d) const {
  ActivationOffload::keep(rows);
  return unpermute_tokens(rows, options_.weights_on_input ? at::Tensor() : d.routing.weights, d.permutation);
}

void Dispatcher::all_to_all(Dispatched& d, const at::Tensor& x, int64_t capacity,
                            const std::function<void()>& meanwhile) const {
  const auto& ep = parallel_->ep;
  const auto& experts = d.routing.experts;
  d.permutation = capacity > 0 ? padded_permutation(experts, options_.experts, capacity) : permutation(experts);
  d.rows = permuted(x, d);
  if (capacity > 0) {
    known_counts(d, capacity);
  } else if (ep.size() > 1) {
    exchange_counts(d, tokens_per_expert(experts, options_.experts));
  } else {
    d.groups = expert_rows(tokens_per_expert(experts, options_.experts), /*tail=*/d.may_drop);
  }
  if (ep.size() == 1) {
    if (meanwhile) meanwhile();
    return;
  }
  const auto arrived = exchange_rows(d.rows.narrow(0, 0, sum(d.sent)), d.sent, d.received, ep, meanwhile);
  d.rows = arrived.index_select(0, d.regroup);
}

void Dispatcher::exchange_counts(Dispatched& d, const at::Tensor& counts) const {
  const auto& ep = parallel_->ep;
  // Sizes of the messages must be known to the host: the one place where an all-to-all waits for the device.
  const auto incoming = ep.all_to_all(counts.contiguous());  // [ep * local]: rank by rank, each one's count per expert
  const auto host = at::stack({counts, incoming}).to(at::kCPU).contiguous();
  const auto per_rank = host.view({2, ep.size(), local_}).sum(2);
  const auto* totals = per_rank.const_data_ptr<int64_t>();
  d.sent.assign(totals, totals + ep.size());
  d.received.assign(totals + ep.size(), totals + 2 * ep.size());
  // Rows arrive rank by rank, by expert inside each: sort them by expert.
  const auto expert = at::arange(local_, counts.options()).repeat({ep.size()});
  const auto order = permutation(expert.repeat_interleave(incoming, std::nullopt, sum(d.received)).unsqueeze(1));
  d.regroup = order.order;
  d.ungroup = order.inverse;
  d.groups = expert_rows(incoming.view({ep.size(), local_}).sum(0), /*tail=*/false);
  if (!d.groups.host.empty()) return;
  const auto ends = host[1].view({ep.size(), local_}).sum(0).cumsum(0);
  d.groups.host.assign(ends.const_data_ptr<int64_t>(), ends.const_data_ptr<int64_t>() + local_);
}

void Dispatcher::known_counts(Dispatched& d, int64_t capacity) const {
  // Every rank sends its capacity, which depends on its number of tokens alone, to every expert: nothing to ask.
  const auto& ep = parallel_->ep;
  const auto options = d.routing.experts.options();
  const auto capacities = ep.all_gather(at::tensor({capacity}, at::kLong));
  const auto* each = capacities.const_data_ptr<int64_t>();
  std::vector<at::Tensor> experts;
  int64_t total = 0;
  for (int rank = 0; rank < ep.size(); ++rank) {
    d.sent.push_back(local_ * capacity);
    d.received.push_back(local_ * each[rank]);
    total += each[rank];
    experts.push_back(at::arange(local_, options).unsqueeze(1).expand({local_, each[rank]}).reshape({-1}));
  }
  const auto order = permutation(at::cat(experts).unsqueeze(1));
  d.regroup = order.order;
  d.ungroup = order.inverse;
  d.groups = expert_rows(at::full({local_}, total, options), /*tail=*/false);
  for (int64_t expert = 1; d.groups.host.size() < static_cast<size_t>(local_); ++expert)
    d.groups.host.push_back(expert * total);
}

void Dispatcher::all_gather(Dispatched& d, at::Tensor x) const {
  const auto& ep = parallel_->ep;
  if (ep.size() > 1) {
    // Packed rows differ in length between data-parallel ranks; all send as much as the longest.
    pad_tokens(x, d.routing, largest({d.shared_tokens}, ep)[0], options_.experts);
    x = gather_sequence(x, ep);
    d.routing.weights = gather_sequence(d.routing.weights, ep);
    const auto here = ep.all_gather(d.routing.experts) - ep.rank() * local_;
    d.routing.experts = here.masked_fill(here.lt(0).logical_or_(here.ge(local_)), local_);
  }
  d.permutation = permutation(d.routing.experts);
  d.rows = permuted(x, d);
  d.groups = expert_rows(tokens_per_expert(d.routing.experts, local_), /*tail=*/ep.size() > 1 || d.may_drop);
}

}  // namespace mcore_bridge
