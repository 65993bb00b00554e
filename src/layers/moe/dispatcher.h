// Tokens travel to the ranks that hold their experts, and the results travel back.
//
// Every rank of an expert-parallel group has tokens of its own (context and data parallel ranks, and tensor ranks under
// sequence parallelism). The ranks of an expert-tensor-parallel group hold slices of the same experts: they share their
// tokens first and add their partial results last.
#pragma once

#include <functional>
#include <vector>

#include "layers/moe/grouped_linear.h"
#include "layers/moe/permutation.h"
#include "layers/moe/router.h"
#include "parallel/parallel_state.h"

namespace mcore_bridge {

/// What combine() needs to undo a dispatch().
struct Dispatched {
  at::Tensor rows;    ///< [n, h] inputs of this rank's experts, sorted by expert
  ExpertRows groups;  ///< of `rows`, one per local expert
  Routing routing;    ///< of the tokens that `permutation` permutes
  Permutation permutation;
  std::vector<int64_t> sent, received;  ///< rows to and from each rank (all-to-all)
  at::Tensor regroup, ungroup;          ///< arrival order <-> expert order (all-to-all)
  bool may_drop = false;                ///< there may be places that go nowhere
  int64_t own_tokens = 0;               ///< of this rank
  int64_t shared_tokens = 0;            ///< of its expert-tensor-parallel group, before padding for an all-gather
};

/// What a rank dispatches, on paper.
struct DispatchLoad {
  int64_t tokens = 0, hidden = 0, topk = 1;
  int64_t element = 4, weight_element = 4;  ///< bytes of an activation and of a routing weight
  int64_t capacity = 0;                     ///< Router::Output::capacity
  int64_t kept = 0;                         ///< places that are not dropped
  bool input_grad = true, weights_grad = true;
  bool experts_grad = true;  ///< the experts learn
};

/// Of an even load: every rank's experts take as many rows as its tokens have places.
struct DispatchFootprint {
  Footprint cost;
  int64_t tokens = 0;    ///< that the permutation sees: those of all ranks that share or gather them
  int64_t places = 0;    ///< of these tokens
  int64_t permuted = 0;  ///< rows of the permutation
  int64_t rows = 0;      ///< inputs of this rank's experts, and ...
  int64_t computed = 0;  ///< ... how many of them a product is made with
  bool output_grad = true, rows_grad = true;
};

class Dispatcher {
 public:
  enum class Kind { kAllToAll, kAllGather };
  struct Options {
    int64_t experts = 0;
    Kind kind = Kind::kAllToAll;
    bool weights_on_input = false;  ///< the routing weights multiply the experts' inputs (llama4), not their outputs
    bool pad_to_capacity = false;
  };
  Dispatcher(ParallelStatePtr parallel, Options options);

  /// Collective over the expert-tensor-parallel and the expert-parallel ranks, any of which may have no token.
  /// `meanwhile` (may be empty) runs once, while tokens are under way if they travel.
  Dispatched dispatch(const at::Tensor& x_th, Router::Output routed, const std::function<void()>& meanwhile) const;
  /// y: the experts' outputs, like Dispatched::rows -> [t, h].
  at::Tensor combine(const at::Tensor& y, const Dispatched& dispatched) const;
  /// Of both, without temporaries.
  DispatchFootprint footprint(const DispatchLoad& load) const;

 private:
  void all_to_all(Dispatched& d, const at::Tensor& x, int64_t capacity, const std::function<void()>& meanwhile) const;
  void all_gather(Dispatched& d, at::Tensor x) const;
  void exchange_counts(Dispatched& d, const at::Tensor& counts) const;
  void known_counts(Dispatched& d, int64_t capacity) const;
  at::Tensor permuted(const at::Tensor& x_th, const Dispatched& dispatched) const;
  at::Tensor unpermuted(const at::Tensor& rows, const Dispatched& dispatched) const;

  ParallelStatePtr parallel_;
  Options options_;
  int64_t local_;     ///< experts of this rank
  bool same_tokens_;  ///< all ranks of an expert-tensor-parallel group have equally many tokens
};

}  // namespace mcore_bridge
