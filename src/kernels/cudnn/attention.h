// cuDNN's fused attention through its graph API, with plans that are kept: device pointers, sizes, a stream. Built
// where CMake finds cuDNN's headers (no_cudnn.cpp takes its place elsewhere); the library is the one torch has loaded.
//
// Causal; rows of keys to the left optionally bounded. bf16 or fp16, statistics fp32.
#pragma once

#include <cstdint>
#include <string>

namespace mcore_bridge::cudnn {

/// Whether it was built in and the library (9.6 or later) is there.
bool available();

/// What a plan is made for. Strides count elements; the head's width has stride 1.
struct Attention {
  struct Strides {
    int64_t batch = 0, token = 0, head = 0;
    auto operator<=>(const Strides&) const = default;
  };
  bool half = false;  ///< float16 instead of bfloat16
  int64_t batch = 1, heads = 1, groups = 1, width = 64;
  int64_t length = 1;        ///< of a row; ragged: of the longest, or more
  int64_t total = 0;         ///< ragged: tokens of all rows together, or more; 0: rows are of one length
  int64_t window_left = -1;  ///< keys to the left besides the own one; -1: all
  bool deterministic = false;
  Strides q, k, v, out;            ///< out: of its gradient, too
  Strides grad_q, grad_k, grad_v;  ///< backward
  auto operator<=>(const Attention&) const = default;
};

/// Element offsets of the rows, [batch + 1] int32: multiples of the token strides.
struct Offsets {
  const void *q = nullptr, *k = nullptr, *v = nullptr, *out = nullptr, *statistics = nullptr;
  const void* grad_k = nullptr;   ///< of grad_k and grad_v; grad_q has those of q
  const void* lengths = nullptr;  ///< [batch] int32
};

struct Tensors {
  const void *q, *k, *v;
  void* out;
  void* statistics;  ///< log-sum-exp: [batch, heads, length], ragged [tokens, heads]
  const void* grad_out = nullptr;
  void *grad_q = nullptr, *grad_k = nullptr, *grad_v = nullptr;
  Offsets offsets;  ///< ragged
};

/// Bytes that the two below need. Makes the plan, which takes tens of milliseconds, the first time. Throws
/// std::runtime_error when cuDNN has none for this GPU and shape.
int64_t workspace(const Attention& shape, bool backward);
void forward(const Attention& shape, const Tensors& tensors, void* workspace, void* stream);
void backward(const Attention& shape, const Tensors& tensors, void* workspace, void* stream);

}  // namespace mcore_bridge::cudnn
