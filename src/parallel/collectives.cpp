#include "parallel/collectives.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <numeric>
#include <utility>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

at::Tensor summed(const at::Tensor& x, const Group& group) {
  auto sum = x.is_contiguous() ? x.clone() : x.contiguous();
  group.all_reduce(sum);
  return sum;
}

at::Tensor slice_of(const at::Tensor& x, int64_t dim, const Group& group) {
  MCB_CHECK(x.size(dim) % group.size() == 0, "sequence parallelism: ", x.size(dim), " positions do not divide by the ",
            group.size(), " tensor-parallel ranks; pad the sequence");
  const auto length = x.size(dim) / group.size();
  return x.narrow(dim, group.rank() * length, length);
}

at::Tensor gather_last(const at::Tensor& x, const Group& group) {
  auto parts = group.all_gather(x.unsqueeze(0));  // [ranks, ..., n]
  return parts.movedim(0, -2).flatten(-2);
}

// A group outlives every graph that uses it (the model holds its ParallelState), so the context keeps a copy by value.
struct GroupHolder : torch::CustomClassHolder {
  explicit GroupHolder(Group g) : group(std::move(g)) {}
  Group group;
};

using Raw = at::Tensor (*)(const at::Tensor&, const Group&);

at::Tensor raw_identity(const at::Tensor& x, const Group&) { return x; }
at::Tensor raw_all_reduce(const at::Tensor& x, const Group& group) { return summed(x, group); }
at::Tensor raw_gather(const at::Tensor& x, const Group& group) { return group.all_gather(x); }
at::Tensor raw_reduce_scatter(const at::Tensor& x, const Group& group) { return group.reduce_scatter(x); }
at::Tensor raw_slice(const at::Tensor& x, const Group& group) { return slice_of(x, 0, group).contiguous(); }
at::Tensor raw_gather_last(const at::Tensor& x, const Group& group) { return gather_last(x, group); }
at::Tensor raw_slice_last(const at::Tensor& x, const Group& group) { return slice_of(x, -1, group).contiguous(); }

/// A communication forward and its conjugate backward.
template <Raw kForward, Raw kBackward>
struct Collective : Function<Collective<kForward, kBackward>> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const Group* group) {
    context->saved_data["group"] = at::IValue::make_capsule(c10::make_intrusive<GroupHolder>(*group));
    if constexpr (kForward == raw_identity) return x.view_as(x);
    return kForward(x, *group);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto holder = context->saved_data["group"].toCapsule();
    const auto& group = static_cast<const GroupHolder*>(holder.get())->group;
    return {kBackward(grads[0], group), Variable()};
  }
};

template <Raw kForward, Raw kBackward>
at::Tensor apply(const at::Tensor& x, const Group& group) {
  if (group.size() == 1) return x;
  return Collective<kForward, kBackward>::apply(x, &group);
}

/// An exchange of rows, either way, between its start and its end.
struct ExchangeState : torch::CustomClassHolder {
  Group group;
  std::vector<int64_t> send, receive;
  std::shared_ptr<Group::Pending> pending;
  at::Tensor gradient;  ///< on its way back

  at::Tensor start(const at::Tensor& rows, const std::vector<int64_t>& to, const std::vector<int64_t>& from) {
    const auto input = rows.contiguous();
    auto sizes = input.sizes().vec();
    sizes[0] = std::accumulate(from.begin(), from.end(), int64_t{0});
    auto output = at::empty(sizes, input.options());
    pending = group.start_all_to_all(output, input, to, from);
    return output;
  }
  void finish() {
    if (pending) pending->wait();
    pending.reset();
  }
};

ExchangeState& state_of(AutogradContext* context) {
  return *static_cast<ExchangeState*>(context->saved_data["state"].toCapsule().get());
}

/// Backward: the last moment for the gradient that ArriveRows sent off.
struct SendRows : Function<SendRows> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x,
                            const c10::intrusive_ptr<ExchangeState>* state) {
    context->saved_data["state"] = at::IValue::make_capsule(*state);
    return (*state)->start(x, (*state)->send, (*state)->receive);
  }
  static variable_list backward(AutogradContext* context, variable_list) {
    auto& state = state_of(context);
    state.finish();
    return {std::exchange(state.gradient, {}), Variable()};
  }
};

struct ArriveRows : Function<ArriveRows> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& rows,
                            const c10::intrusive_ptr<ExchangeState>* state) {
    context->saved_data["state"] = at::IValue::make_capsule(*state);
    (*state)->finish();
    return rows.view_as(rows);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    auto& state = state_of(context);
    state.gradient = state.start(grads[0], state.receive, state.send);
    return {grads[0], Variable()};  // SendRows looks at state.gradient instead
  }
};

}  // namespace

at::Tensor copy_to_region(const at::Tensor& x, const Group& group) {
  return apply<raw_identity, raw_all_reduce>(x, group);
}
at::Tensor reduce_from_region(const at::Tensor& x, const Group& group) {
  return apply<raw_all_reduce, raw_identity>(x, group);
}
at::Tensor gather_sequence(const at::Tensor& x, const Group& group) {
  return apply<raw_gather, raw_reduce_scatter>(x, group);
}
at::Tensor gather_sequence_replicated(const at::Tensor& x, const Group& group) {
  return apply<raw_gather, raw_slice>(x, group);
}
at::Tensor reduce_scatter_sequence(const at::Tensor& x, const Group& group) {
  return apply<raw_reduce_scatter, raw_gather>(x, group);
}
at::Tensor scatter_sequence(const at::Tensor& x, const Group& group) { return apply<raw_slice, raw_gather>(x, group); }
at::Tensor gather_last_dim(const at::Tensor& x, const Group& group) {
  return apply<raw_gather_last, raw_slice_last>(x, group);
}

at::Tensor exchange_rows(const at::Tensor& x, const std::vector<int64_t>& send, const std::vector<int64_t>& receive,
                         const Group& group, const std::function<void()>& meanwhile) {
  if (group.size() == 1) {
    if (meanwhile) meanwhile();
    return x;
  }
  auto state = c10::make_intrusive<ExchangeState>();
  state->group = group;
  state->send = send;
  state->receive = receive;
  const auto rows = SendRows::apply(x, &state);
  if (meanwhile) meanwhile();
  return ArriveRows::apply(rows, &state);
}

}  // namespace mcore_bridge
