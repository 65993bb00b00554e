// The CUDA kernels as plain functions: device pointers, sizes, a stream. Nothing here knows torch, so nvcc compiles the
// .cu files alone. Without a CUDA build no_cuda.cpp takes their place: `built()` says which.
//
// Every pointer to activations is of `type`; statistics and partial sums are fp32. Rows are contiguous.
#pragma once

#include <cstdint>

namespace mcore_bridge::cuda {

enum class Type { kFloat, kBFloat16, kHalf };
using Stream = void*;  ///< cudaStream_t

/// Whether the kernels are compiled in.
bool built();

/// Elements of one 16-byte access.
constexpr int64_t vector_elements(Type type) { return type == Type::kFloat ? 4 : 8; }

struct RmsNorm {
  int64_t rows, columns;
  const void *x, *delta;  ///< [rows, columns]; delta may be null: added to x first
  const void* weight;     ///< [columns]
  void *normed, *sum;     ///< outputs; sum (x + delta) only with delta
  int64_t normed_stride;  ///< from one row of normed to the next
  float* rstd;            ///< [rows]
  float epsilon;
  bool zero_centered;
};
/// Widest row the norm kernels take.
constexpr int64_t max_norm_columns(Type type) { return 4096 * vector_elements(type); }
void rms_norm_forward(const RmsNorm& p, Type type, Stream stream);
/// normed from x and rstd again.
void rms_norm_apply(const RmsNorm& p, Type type, Stream stream);

struct RmsNormBackward {
  int64_t rows, columns, blocks;
  const void *grad, *x, *weight;
  const void* grad_residual;  ///< may be null: added to grad_x
  const float* rstd;
  void *grad_x, *normed;   ///< normed may be null
  float* weight_partials;  ///< [blocks, columns]; may be null
  bool zero_centered;
};
void rms_norm_backward(const RmsNormBackward& p, Type type, Stream stream);

/// Fused query, key and value rows [tokens, groups, per_group + 2, d] taken apart, heads normalised and rotated. Fewer
/// than 2^31 heads.
struct SplitQkv {
  int64_t tokens, batch, groups, per_group, d;
  int64_t half;                             ///< rotated / 2; 0: no rotation
  bool interleaved, table_per_batch;        ///< table rows: token, or token / batch
  const void *mixed, *q_weight, *k_weight;  ///< weights null: heads are not normalised
  const void *cos, *sin;                    ///< [positions, half]
  void *q, *k, *v;                          ///< [tokens, heads, d], [tokens, groups, d]; v may be null
  float epsilon;
  bool zero_centered;
};
/// Head widths the kernels take: 16 lanes hold a head.
constexpr bool split_qkv_width(int64_t d) { return d == 64 || d == 128 || d == 256; }
void split_qkv_forward(const SplitQkv& p, Type type, Stream stream);

struct SplitQkvBackward {
  SplitQkv forward;  ///< q, k, v: the gradients coming in; mixed only read when heads are normalised
  void* grad_mixed;
  float* weight_partials;  ///< [blocks, 2, d] (q, k); may be null
  int64_t blocks;
};
void split_qkv_backward(const SplitQkvBackward& p, Type type, Stream stream);

struct Gated {
  int64_t rows, width;  ///< x [rows, 2 * width] = [gate | up]
  int activation;       ///< 0 silu, 1 gelu, 2 gelu_tanh
  const void *x, *grad;
  void *out, *grad_x;  ///< backward: out may be null
  int64_t out_stride;  ///< from one row of out to the next
};
void gated_forward(const Gated& p, Type type, Stream stream);
void gated_backward(const Gated& p, Type type, Stream stream);

/// One block of rows of logits.
struct CrossEntropy {
  int64_t rows, columns, stride;  ///< columns that are real; stride: allocated ones
  int64_t first_column;           ///< of this rank
  void* logits;                   ///< gradients replace them
  const int64_t* labels;          ///< [rows], of the whole vocabulary; negative: no loss
  float *maximum, *sum, *target;  ///< [rows] each
  const float* weight;            ///< [rows]: what each row's loss counts; null: `*scale` each
  const double* scale;            ///< on the device
};
/// maximum, sum of exp(logit - maximum), logit of the label (0 when elsewhere).
void cross_entropy_statistics(const CrossEntropy& p, Type type, Stream stream);
/// logits <- (softmax - one-hot) * weight, from maximum and sum; columns beyond the real ones become 0.
void cross_entropy_gradient(const CrossEntropy& p, Type type, Stream stream);
/// Both in one pass over a row.
void cross_entropy_both(const CrossEntropy& p, Type type, Stream stream);

/// LoRA's B of a fused layer: see kernels/lora_b.h. Fewer than 2^31 elements.
struct LoraB {
  static constexpr int kMaxParts = 8;
  int parts, blocks, r, columns;
  int first_row[kMaxParts + 1];      ///< of each part in a block
  int first_compact_row[kMaxParts];  ///< the same in B, -1: not adapted
  int first_column[kMaxParts];       ///< of the part's A
  int compact_rows;                  ///< of a block in B
  float scaling;
  bool accumulate;
  const void* from;
  void* to;
  void* inside;  ///< expand_b: a second copy, its rows `inside_stride` apart; or null
  int inside_stride;
};
void expand_b(const LoraB& p, Type type, Stream stream);
void collect_b(const LoraB& p, Type from, Type to, Stream stream);

/// Tokens to the rows of their places and back: see kernels/permute_rows.h.
struct PermuteRows {
  int64_t tokens, rows, columns;
  int topk;
  const int64_t* row_of_place;  ///< [tokens, topk]; `rows` and beyond: none
  const float* weights;         ///< [tokens, topk]; null: 1
  const void* x;                ///< spread: tokens; combine: rows
  void* out;                    ///< the other; spread: may be null
  const void* against;          ///< spread, with products: [rows, columns]
  float* products;              ///< [tokens, topk]: each token times that row; null: not asked for
};
void spread_rows(const PermuteRows& p, Type type, Stream stream);
void combine_rows(const PermuteRows& p, Type type, Stream stream);

/// Sums of squares, one a block of elements of each tensor.
struct Squares {
  static constexpr int kMaxTensors = 128;
  int count;
  const void* x[kMaxTensors];
  int64_t elements[kMaxTensors];
  int first_block[kMaxTensors + 1];
  float* partials;  ///< [first_block[count]]
};
constexpr int64_t kSquaresBlock = 65536;
void sum_of_squares(const Squares& p, Type type, Stream stream);

/// AdamW over a list of tensors in one launch per kMaxTensors of them.
struct AdamW {
  static constexpr int kMaxTensors = 48;
  int count;
  void *master[kMaxTensors], *exp_avg[kMaxTensors], *exp_avg_sq[kMaxTensors];
  const void* grad[kMaxTensors];
  void* parameter[kMaxTensors];  ///< low-precision copy, written from the master; null: none
  int64_t elements[kMaxTensors];
  int first_block[kMaxTensors + 1];
  const float *grad_scale, *skip, *step;  ///< device scalars
  float lr, beta1, beta2, epsilon, weight_decay;
};
constexpr int64_t kAdamWBlock = 16384;  ///< elements a block updates
/// fp32, or all of those that are not the same half precision.
struct AdamWTypes {
  Type master = Type::kFloat, grad = Type::kFloat, exp_avg = Type::kFloat, exp_avg_sq = Type::kFloat,
       parameter = Type::kFloat;
  bool remainder = false;  ///< `master` holds what bf16 parameters lack of theirs, 16 bits each: param_remainder.h
  bool operator==(const AdamWTypes&) const = default;
  bool has(Type type) const {
    return master == type || grad == type || exp_avg == type || exp_avg_sq == type || parameter == type;
  }
};
void adamw(const AdamW& p, const AdamWTypes& types, Stream stream);

}  // namespace mcore_bridge::cuda
