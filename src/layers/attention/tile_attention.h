// Attention over tiles: partial results with their log-sum-exp, merged exactly, and the matching backward.
//
// Shapes: q, out [s, b, n, d]; k, v [t, b, g, d] (g key/value heads, each serving n / g query heads); log_sum [s, b,
// n].
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "layers/attention/tile.h"

namespace mcore_bridge {

/// Tiles with what kernels need of them on the device, made once a micro-batch and used by every layer.
class TileSet {
 public:
  TileSet() = default;
  TileSet(std::vector<Tile> tiles, c10::Device device);

  /// Tiles that one variable-length kernel call can do: alike in their masks, no row of queries twice.
  struct Group {
    int64_t left = -1, right = -1;  ///< the kernel's window beside the lower right diagonal; -1: unbounded
    std::vector<Tile> tiles;
    int64_t max_q = 0, max_k = 0;
    at::Tensor q_rows, k_rows;  ///< int64 rows, one tile after another; undefined with a single tile
    at::Tensor q_ends, k_ends;  ///< int32 cumulative counts
  };
  const std::vector<Tile>& tiles() const { return tiles_; }
  const std::vector<Group>& groups() const { return groups_; }  ///< empty on the CPU

 private:
  std::vector<Tile> tiles_;
  std::vector<Group> groups_;
};

/// Attention over what was attended to so far: softmax-weighted values and the logarithm of the softmax denominators.
struct PartialAttention {
  at::Tensor out, log_sum;  ///< fp32 (fp64 for fp64 inputs)
  /// Nothing attended to yet.
  static PartialAttention none(const at::Tensor& q);
};

/// Adds the tiles' keys to `sum`. No gradients.
void attend(PartialAttention& sum, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const TileSet& tiles);

/// One more key for every query, of score `sinks` [n] and value 0 (gpt-oss): after all tiles. attend_backward is then
/// right as it is, given the `out` and `log_sum` this leaves.
void attend_to_sinks(PartialAttention& sum, const at::Tensor& sinks);

/// What backward knows of the whole attention: its result (in q's dtype), log-sum-exp, and the result's gradient.
struct AttentionGradient {
  at::Tensor q, out, log_sum, grad_out;
};

/// Adds the tiles' share of the gradients to dq, dk, dv (dtype of PartialAttention).
void attend_backward(const AttentionGradient& whole, const at::Tensor& k, const at::Tensor& v, const TileSet& tiles,
                     at::Tensor& dq, at::Tensor& dk, at::Tensor& dv);

/// The gradient of `sinks`, in its dtype.
at::Tensor sinks_gradient(const AttentionGradient& whole, const at::Tensor& sinks);

}  // namespace mcore_bridge
