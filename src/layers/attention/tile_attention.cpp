#include "layers/attention/tile_attention.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace mcore_bridge {
namespace {

constexpr int64_t kBlockElements = 1 << 24;  // scores of one block held in fp32: 64 MiB

at::ScalarType sum_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

double scale_of(const at::Tensor& q) { return 1 / std::sqrt(static_cast<double>(q.size(-1))); }

bool flash_on_gpu(const at::Tensor& q) {
  const bool half = q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16;
  return q.is_cuda() && half && q.size(-1) <= 256 && q.size(-1) % 8 == 0;
}

/// [s, b, n, ...] -> [b, n, s, ...]
at::Tensor heads_first(const at::Tensor& x) { return x.dim() == 4 ? x.permute({1, 2, 0, 3}) : x.permute({1, 2, 0}); }
at::Tensor rows_first(const at::Tensor& x) { return x.dim() == 4 ? x.permute({2, 0, 1, 3}) : x.permute({2, 0, 1}); }

at::Tensor q_rows(const at::Tensor& x, const Tile& tile) { return x.narrow(0, tile.q_first, tile.q_count); }
at::Tensor k_rows(const at::Tensor& x, const Tile& tile) { return x.narrow(0, tile.k_first, tile.k_count); }

/// Exact merge of two partial softmaxes, into the first.
void merge(const at::Tensor& out, const at::Tensor& log_sum, const at::Tensor& more, const at::Tensor& more_log_sum) {
  const auto total = at::logaddexp(log_sum, more_log_sum);
  out.mul_((log_sum - total).exp_().unsqueeze(-1))
      .addcmul_(more.to(out.scalar_type()), (more_log_sum - total).exp_().unsqueeze(-1));
  log_sum.copy_(total);
}

/// Calls f with pieces of the tile whose scores fit into a block.
template <class F>
void for_blocks(const Tile& tile, int64_t scores_per_pair, F f) {
  // Few rows at a time keep a window's keys few too.
  const auto keys = tile.windowed ? std::min(tile.k_count, 2 * tile.window + 1) : tile.k_count;
  auto rows = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, keys * scores_per_pair));
  if (tile.windowed) rows = std::min(rows, std::max<int64_t>(64, tile.window));
  for (int64_t first = 0; first < tile.q_count; first += rows) {
    auto block = tile;
    block.q_first += first;
    block.q_count = std::min(rows, tile.q_count - first);
    block.distance += first;
    if (const auto seen = tile.causal || tile.windowed ? visible(block) : block) f(*seen);
  }
}

/// Scores of a block in sums' precision, hidden ones -inf: [b, g, n / g, rows, keys].
struct Block {
  at::Tensor q, k, v;  ///< [b, g, n / g * rows, d], [b, g, keys, d]

  Block(const Tile& tile, const at::Tensor& all_q, const at::Tensor& all_k, const at::Tensor& all_v)
      : q(group_heads(q_rows(all_q, tile), all_k.size(2))),
        k(heads_first(k_rows(all_k, tile)).to(sum_type(all_q))),
        v(heads_first(k_rows(all_v, tile)).to(sum_type(all_q))),
        tile_(tile) {}

  /// [rows, b, n, d] -> [b, g, n / g * rows, d]
  static at::Tensor group_heads(const at::Tensor& x, int64_t groups) {
    return heads_first(x).to(sum_type(x)).reshape({x.size(1), groups, -1, x.size(3)});
  }
  at::Tensor ungroup_heads(const at::Tensor& x) const {
    return rows_first(x.reshape({x.size(0), -1, tile_.q_count, x.size(3)}));
  }
  /// [rows, b, n] <-> [b, g, n / g * rows, 1]
  at::Tensor group_rows(const at::Tensor& x) const { return heads_first(x).reshape({x.size(1), k.size(1), -1, 1}); }
  at::Tensor ungroup_rows(const at::Tensor& x) const { return rows_first(x.reshape({x.size(0), -1, tile_.q_count})); }

  at::Tensor scores() const {
    auto result = at::matmul(q, k.transpose(-1, -2)).mul_(scale_of(q));
    if (!tile_.causal && !tile_.windowed) return result;
    const auto options = at::TensorOptions(q.device()).dtype(at::kLong);
    const auto apart = (at::arange(tile_.q_count, options) + tile_.distance).unsqueeze(1) -
                       at::arange(tile_.k_count, options).unsqueeze(0);
    auto hidden = apart.lt(0);
    if (tile_.windowed) hidden.logical_or_(apart.gt(tile_.window));
    auto by_head = result.view({result.size(0), result.size(1), -1, tile_.q_count, tile_.k_count});
    by_head.masked_fill_(hidden, -std::numeric_limits<double>::infinity());
    return result;
  }

 private:
  Tile tile_;
};

int64_t scores_per_pair(const at::Tensor& q) { return q.size(1) * q.size(2); }

void attend_in_blocks(PartialAttention& sum, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const Tile& tile) {
  for_blocks(tile, scores_per_pair(q), [&](const Tile& piece) {
    const Block block(piece, q, k, v);
    auto scores = block.scores();
    const auto log_sum = scores.logsumexp(-1, /*keepdim=*/true);
    const auto out = at::matmul(scores.sub_(log_sum).exp_(), block.v);
    merge(q_rows(sum.out, piece), q_rows(sum.log_sum, piece), block.ungroup_heads(out), block.ungroup_rows(log_sum));
  });
}

void attend_backward_in_blocks(const AttentionGradient& whole, const at::Tensor& k, const at::Tensor& v,
                               const Tile& tile, at::Tensor& dq, at::Tensor& dk, at::Tensor& dv) {
  for_blocks(tile, scores_per_pair(whole.q), [&](const Tile& piece) {
    const Block block(piece, whole.q, k, v);
    const auto weights = block.scores().sub_(block.group_rows(q_rows(whole.log_sum, piece))).exp_();
    const auto grad = Block::group_heads(q_rows(whole.grad_out, piece), k.size(2));
    const auto out = Block::group_heads(q_rows(whole.out, piece), k.size(2));
    const auto delta = (grad * out).sum(-1, /*keepdim=*/true);
    k_rows(dv, piece).add_(rows_first(at::matmul(weights.transpose(-1, -2), grad)));
    const auto grad_scores =
        at::matmul(grad, block.v.transpose(-1, -2)).sub_(delta).mul_(weights).mul_(scale_of(whole.q));
    q_rows(dq, piece).add_(block.ungroup_heads(at::matmul(grad_scores, block.k)));
    k_rows(dk, piece).add_(rows_first(at::matmul(grad_scores.transpose(-1, -2), block.q)));
  });
}

/// A tile as libtorch's CPU kernel can do it: unmasked, or a square with the diagonal; others as several such.
/// False: its mask is a window.
template <class F>
bool for_cpu_kernel(const Tile& tile, F f) {
  if (tile.windowed) return false;
  if (!tile.causal || (tile.distance == 0 && tile.q_count == tile.k_count)) {
    f(tile);
    return true;
  }
  // All keys up to the first query, then the square below the diagonal (visible() left nothing behind it).
  auto before = tile, square = tile;
  before.k_count = tile.distance;
  before.causal = false;
  square.k_first += tile.distance;
  square.k_count -= tile.distance;
  square.distance = 0;
  if (square.q_count != square.k_count) return false;
  if (before.k_count > 0) f(before);
  f(square);
  return true;
}

void attend_on_cpu(PartialAttention& sum, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const Tile& tile) {
  const bool done = for_cpu_kernel(tile, [&](const Tile& piece) {
    const auto [out, log_sum] = at::_scaled_dot_product_flash_attention_for_cpu(
        heads_first(q_rows(q, piece)), heads_first(k_rows(k, piece)), heads_first(k_rows(v, piece)), 0.0, piece.causal);
    merge(q_rows(sum.out, piece), q_rows(sum.log_sum, piece), rows_first(out), rows_first(log_sum));
  });
  if (!done) attend_in_blocks(sum, q, k, v, tile);
}

void attend_backward_on_cpu(const AttentionGradient& whole, const at::Tensor& k, const at::Tensor& v, const Tile& tile,
                            at::Tensor& dq, at::Tensor& dk, at::Tensor& dv) {
  const bool done = for_cpu_kernel(tile, [&](const Tile& piece) {
    const auto [gq, gk, gv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        heads_first(q_rows(whole.grad_out, piece)), heads_first(q_rows(whole.q, piece)), heads_first(k_rows(k, piece)),
        heads_first(k_rows(v, piece)), heads_first(q_rows(whole.out, piece)), heads_first(q_rows(whole.log_sum, piece)),
        0.0, piece.causal);
    q_rows(dq, piece).add_(rows_first(gq));
    k_rows(dk, piece).add_(rows_first(gk));
    k_rows(dv, piece).add_(rows_first(gv));
  });
  if (!done) attend_backward_in_blocks(whole, k, v, tile, dq, dk, dv);
}

/// The rows of a group of tiles, laid one after another for a variable-length kernel.
struct Rows {
  const TileSet::Group& group;
  at::Tensor of_q(const at::Tensor& x) const {
    return group.q_rows.defined() ? x.index_select(0, group.q_rows) : q_rows(x, group.tiles[0]);
  }
  at::Tensor of_k(const at::Tensor& x) const {
    return group.k_rows.defined() ? x.index_select(0, group.k_rows) : k_rows(x, group.tiles[0]);
  }
  void put_q(const at::Tensor& x, const at::Tensor& rows) const {
    if (group.q_rows.defined()) x.index_copy_(0, group.q_rows, rows);
  }
  void add_q(at::Tensor& x, const at::Tensor& rows) const {
    if (group.q_rows.defined()) {
      x.index_add_(0, group.q_rows, rows.to(x.scalar_type()));
    } else {
      q_rows(x, group.tiles[0]).add_(rows);
    }
  }
  void add_k(at::Tensor& x, const at::Tensor& rows) const {
    if (group.k_rows.defined()) {
      x.index_add_(0, group.k_rows, rows.to(x.scalar_type()));
    } else {
      k_rows(x, group.tiles[0]).add_(rows);
    }
  }
};

std::optional<int64_t> bound(int64_t side) { return side < 0 ? std::nullopt : std::optional<int64_t>(side); }

void attend_on_gpu(PartialAttention& sum, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const TileSet::Group& group) {
  const Rows rows{group};
  const bool several = group.q_rows.defined();
  // [t, n, d] with cumulative counts, or [b, s, n, d].
  auto layout = [&](const at::Tensor& x) { return several ? x.squeeze(1) : x.transpose(0, 1); };
  const auto result = at::_flash_attention_forward(
      layout(rows.of_q(q)), layout(rows.of_k(k)), layout(rows.of_k(v)),
      several ? std::optional<at::Tensor>(group.q_ends) : std::nullopt,
      several ? std::optional<at::Tensor>(group.k_ends) : std::nullopt, group.max_q, group.max_k, 0.0,
      /*is_causal=*/group.left < 0 && group.right == 0, false, std::nullopt, bound(group.left), bound(group.right));
  const auto& out = std::get<0>(result);
  const auto& log_sum = std::get<1>(result);  // [n, t] or [b, n, s]
  if (!several) {
    merge(q_rows(sum.out, group.tiles[0]), q_rows(sum.log_sum, group.tiles[0]), out.transpose(0, 1),
          log_sum.permute({2, 0, 1}));
    return;
  }
  const auto have = rows.of_q(sum.out), have_log_sum = rows.of_q(sum.log_sum);
  merge(have, have_log_sum, out.unsqueeze(1), log_sum.t().unsqueeze(1));
  rows.put_q(sum.out, have);
  rows.put_q(sum.log_sum, have_log_sum);
}

void attend_backward_on_gpu(const AttentionGradient& whole, const at::Tensor& k, const at::Tensor& v,
                            const TileSet::Group& group, at::Tensor& dq, at::Tensor& dk, at::Tensor& dv) {
  const Rows rows{group};
  const bool several = group.q_rows.defined();
  auto layout = [&](const at::Tensor& x) { return (several ? x.squeeze(1) : x.transpose(0, 1)).contiguous(); };
  const auto log_sum = rows.of_q(whole.log_sum);
  const auto random = at::zeros({2}, at::TensorOptions(whole.q.device()).dtype(at::kUInt64));  // no dropout: not read
  const auto [gq, gk, gv] = at::_flash_attention_backward(
      layout(rows.of_q(whole.grad_out)), layout(rows.of_q(whole.q)), layout(rows.of_k(k)), layout(rows.of_k(v)),
      layout(rows.of_q(whole.out)),
      several ? log_sum.squeeze(1).t().contiguous() : log_sum.permute({1, 2, 0}).contiguous(),
      several ? group.q_ends : at::Tensor(), several ? group.k_ends : at::Tensor(), group.max_q, group.max_k, 0.0,
      /*is_causal=*/group.left < 0 && group.right == 0, random, at::empty({}, random.options()), std::nullopt,
      bound(group.left), bound(group.right));
  auto back = [&](const at::Tensor& x) { return several ? x.unsqueeze(1) : x.transpose(0, 1); };
  rows.add_q(dq, back(gq));
  rows.add_k(dk, back(gk));
  rows.add_k(dv, back(gv));
}

/// int64 rows of spans, one after another, and int32 cumulative counts.
template <class First, class Count>
std::pair<at::Tensor, at::Tensor> rows_of(const std::vector<Tile>& tiles, First first, Count count,
                                          c10::Device device) {
  std::vector<int64_t> rows;
  std::vector<int32_t> ends{0};
  for (const auto& tile : tiles) {
    for (int64_t i = 0; i < count(tile); ++i) rows.push_back(first(tile) + i);
    ends.push_back(static_cast<int32_t>(rows.size()));
  }
  return {at::tensor(rows, at::kLong).to(device), at::tensor(ends, at::kInt).to(device)};
}

}  // namespace

TileSet::TileSet(std::vector<Tile> tiles, c10::Device device) : tiles_(std::move(tiles)) {
  if (!device.is_cuda()) return;
  std::vector<int64_t> last_rows;  // by group: behind its last query
  for (const auto& tile : tiles_) {
    // The kernel's diagonal ends in the lower right corner; how far ours lies to the right of it.
    const auto shift = tile.distance - tile.k_count + tile.q_count;
    const auto left = tile.windowed ? tile.window - shift : -1, right = tile.causal ? shift : -1;
    size_t i = 0;
    while (i < groups_.size() &&
           (groups_[i].left != left || groups_[i].right != right || last_rows[i] > tile.q_first)) {
      ++i;
    }
    if (i == groups_.size()) {
      groups_.push_back({.left = left, .right = right});
      last_rows.push_back(0);
    }
    auto& group = groups_[i];
    group.tiles.push_back(tile);
    group.max_q = std::max(group.max_q, tile.q_count);
    group.max_k = std::max(group.max_k, tile.k_count);
    last_rows[i] = tile.q_first + tile.q_count;
  }
  for (auto& group : groups_) {
    if (group.tiles.size() == 1) continue;
    std::tie(group.q_rows, group.q_ends) =
        rows_of(group.tiles, [](const Tile& t) { return t.q_first; }, [](const Tile& t) { return t.q_count; }, device);
    std::tie(group.k_rows, group.k_ends) =
        rows_of(group.tiles, [](const Tile& t) { return t.k_first; }, [](const Tile& t) { return t.k_count; }, device);
  }
}

PartialAttention PartialAttention::none(const at::Tensor& q) {
  const auto options = q.options().dtype(sum_type(q)).requires_grad(false);
  return {at::zeros(q.sizes(), options),
          at::full({q.size(0), q.size(1), q.size(2)}, -std::numeric_limits<double>::infinity(), options)};
}

void attend(PartialAttention& sum, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
            const TileSet& tiles) {
  if (flash_on_gpu(q)) {
    for (const auto& group : tiles.groups()) attend_on_gpu(sum, q, k, v, group);
    return;
  }
  for (const auto& tile : tiles.tiles()) {
    q.is_cpu() ? attend_on_cpu(sum, q, k, v, tile) : attend_in_blocks(sum, q, k, v, tile);
  }
}

void attend_to_sinks(PartialAttention& sum, const at::Tensor& sinks) {
  const auto total = at::logaddexp(sum.log_sum, sinks.to(sum.log_sum.scalar_type()));
  sum.out.mul_((sum.log_sum - total).exp_().unsqueeze(-1));
  sum.log_sum = total;
}

at::Tensor sinks_gradient(const AttentionGradient& whole, const at::Tensor& sinks) {
  const auto type = whole.log_sum.scalar_type();
  const auto delta = (whole.grad_out.to(type) * whole.out.to(type)).sum(-1);
  const auto weights = (sinks.to(type) - whole.log_sum).exp_();
  return weights.mul_(delta).sum(at::IntArrayRef{0, 1}).neg_().to(sinks.scalar_type());
}

void attend_backward(const AttentionGradient& whole, const at::Tensor& k, const at::Tensor& v, const TileSet& tiles,
                     at::Tensor& dq, at::Tensor& dk, at::Tensor& dv) {
  if (flash_on_gpu(whole.q)) {
    for (const auto& group : tiles.groups()) attend_backward_on_gpu(whole, k, v, group, dq, dk, dv);
    return;
  }
  for (const auto& tile : tiles.tiles()) {
    whole.q.is_cpu() ? attend_backward_on_cpu(whole, k, v, tile, dq, dk, dv)
                     : attend_backward_in_blocks(whole, k, v, tile, dq, dk, dv);
  }
}

}  // namespace mcore_bridge
