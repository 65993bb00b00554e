// Causal attention by cuDNN's graph API where there is a plan for it: packed rows, sliding windows. About twice as fast
// as flash attention on Hopper.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <mutex>

#include "mcore_bridge/model.h"

namespace mcore_bridge {

/// The documents of a packed row as cuDNN reads them; all layers of a micro-batch share what it makes. Numbers of
/// documents and lengths are rounded up, so that few plans serve all micro-batches.
class RaggedRows {
 public:
  /// `tokens`: of all documents. Where they end is read on the device only.
  RaggedRows(const PackedSeqParams& packed, int64_t tokens);

  int64_t documents() const { return documents_; }  ///< rounded up; those behind the real ones are empty
  int64_t longest() const { return longest_; }      ///< rounded up
  int64_t tokens() const { return tokens_; }        ///< rounded up
  /// int32 [documents]
  const at::Tensor& lengths();
  /// int32 [documents + 1]: where each begins when a token is `stride` elements.
  const at::Tensor& offsets(int64_t stride);

 private:
  const at::Tensor& ends();

  at::Tensor cu_seqlens_, ends_, lengths_;
  int64_t documents_ = 1, longest_ = 1, tokens_ = 1;
  std::map<int64_t, at::Tensor> offsets_;
  std::mutex mutex_;  // recomputation runs on autograd's threads
};

/// q [s, b, n, d], k and v [s, b, groups, d] -> [s, b, n * d]; with `rows` b is 1 and documents do not see one another.
/// Undefined when cuDNN is not there or has no plan for it.
at::Tensor cudnn_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const std::shared_ptr<RaggedRows>& rows, int64_t window_left);

/// Whether cudnn_attention may be asked for tensors of this device.
bool cudnn_attention_here(c10::Device device);

}  // namespace mcore_bridge
