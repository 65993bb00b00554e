// FP8 on CUDA as plain functions; see launch.h. Matrices are row-major and both operands of a product lie along the
// summed dimension, the only way the tensor cores of compute capability 8.9 and 9.0 take them.
#pragma once

#include "launch.h"

namespace mcore_bridge::cuda {

/// One number for all of a matrix; one per row and 128 columns; one per block of 128 x 128.
enum class Fp8Scaling { kTensor, kRows, kBlocks };

/// Raises *amax to the largest magnitude of x (NaN does not count).
void fp8_amax(const void* x, int64_t elements, float* amax, Type type, Stream stream);

struct Fp8Quantize {
  int64_t rows, columns;  ///< of x; columns: a multiple of 16
  int64_t padded;  ///< rows of q, columns of q_t: a multiple of 16 (of 128 for kRows and kBlocks), zeros beyond `rows`
  Fp8Scaling scaling;
  bool e5m2;
  const void* x;
  uint8_t *q, *q_t;        ///< [padded, columns], [columns, padded]; either may be null
  const float* reference;  ///< kTensor: the magnitude that becomes the format's largest number
  float* amax;             ///< kTensor: raised to the largest magnitude of x; may be null
  float *scale, *scale_t;  ///< what q and q_t count: kTensor one number (`scale`); kRows [columns / 128, padded] and
                           ///< [padded / 128, columns]; kBlocks rows of `scale_stride` and `scale_t_stride`
  int64_t scale_stride, scale_t_stride;
};
void fp8_quantize(const Fp8Quantize& p, Type type, Stream stream);

/// A weight's codes turned round, and its scales where they are one a block.
struct Fp8Turn {
  int64_t rows, columns;  ///< of q: multiples of 16
  const uint8_t* q;
  uint8_t* q_t;        ///< [columns, rows]
  const float* scale;  ///< kBlocks: rows of `scale_stride`; null: one number for all, which stays
  float* scale_t;      ///< rows of `scale_t_stride`
  int64_t scale_stride, scale_t_stride;
};
void fp8_turn(const Fp8Turn& p, Stream stream);

/// Parts of flattened weights in fp32 that become e4m3 codes: shards of the optimizer's masters cut weights anywhere.
struct Fp8Parts {
  static constexpr int kMaxParts = 48;
  int count;
  const float* values[kMaxParts];  ///< of element `begin`
  uint8_t* codes[kMaxParts];
  int64_t begin[kMaxParts], end[kMaxParts];  ///< in the flattened weight
  int64_t columns[kMaxParts];                ///< of the weight
  int64_t first[kMaxParts];                  ///< of the weight's magnitudes in `amax`
  int64_t stride[kMaxParts];                 ///< of rows of blocks there; 0: one magnitude for all
  int first_block[kMaxParts + 1];
  float* amax;
};
constexpr int64_t kFp8PartsBlock = 16384;  ///< elements a block looks at
constexpr int64_t kFp8PartsWindow = 128;   ///< a block begins at a multiple of this many elements of the weight
/// Raises the magnitudes to those of the values as `rounding` has them.
void fp8_parts_amax(const Fp8Parts& p, Type rounding, Stream stream);
/// Codes of the same values, scaled for the magnitudes.
void fp8_parts_quantize(const Fp8Parts& p, Type rounding, Stream stream);

/// What codes count, from the magnitudes they were scaled for.
struct Fp8Scales {
  static constexpr int kMaxWeights = 128;
  int count;
  float* scale[kMaxWeights];
  int64_t first[kMaxWeights];  ///< in `amax`
  int numbers[kMaxWeights];
  const float* amax;
};
void fp8_scales(const Fp8Scales& p, Stream stream);

/// to [m, n] (+)= a [m, k] b [n, k]^T, accumulated in fp32.
struct Fp8Matmul {
  int64_t m, n, k;
  const void *a, *b;
  const float *scale_a, *scale_b;
  Fp8Scaling scaling_a, scaling_b;
  bool e5m2_a, e5m2_b;
  void* to;
  bool accumulate;
  void* workspace;
  int64_t workspace_bytes;
};
/// `type`: of `to`. Algorithms are chosen once for every shape.
void fp8_matmul(const Fp8Matmul& p, Type type, Stream stream);

/// Compute capability of the current device, 90 for 9.0.
int compute_capability();
/// Whether the library knows kRows and kBlocks (CUDA 12.9).
bool fp8_has_blocks();

}  // namespace mcore_bridge::cuda
