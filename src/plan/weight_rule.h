// One line of a family's weight table: a parameter of the engine and the Hugging Face tensors it is made of.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mcore_bridge {

/// How a parameter is spread over the tensor-parallel ranks.
enum class Shard {
  kReplicated,  ///< every rank holds all of it
  kColumn,      ///< rows of the matrix (dim 0, the outputs of the layer) are split
  kRow,         ///< columns of the matrix (dim 1, the inputs of the layer) are split
};

/// How several Hugging Face tensors make one parameter.
enum class Fuse {
  kNone,    ///< one tensor
  kQkv,     ///< {q, k, v}: rows grouped per key/value head, [q heads of the group | k | v]
  kGateUp,  ///< {gate, up}: each rank holds [its gate rows ; its up rows]
  kStack,   ///< one after the other along dim 0, each whole (LoRA A of a fused projection)
};

/// Sizes a kQkv rule needs.
struct HeadLayout {
  int64_t heads = 0, groups = 0, head_dim = 0;
};

struct WeightRule {
  std::string name;  ///< Megatron name inside one chunk, e.g. "decoder.layers.3.mlp.linear_fc2.weight"
  std::vector<std::string>
      hf;  ///< full Hugging Face names, one per fused part; an empty string: that part is absent (LoRA on q and v only)
  int64_t rows = 0;  ///< whole (unsplit) rows of the parameter over all present parts: dim 0
  int64_t cols = 0;  ///< whole columns; 0 for a vector
  Shard shard = Shard::kReplicated;
  Fuse fuse = Fuse::kNone;
  HeadLayout heads = {};  ///< kQkv only
  /// Rows of the local parameter are padded so that the tensor-parallel size divides them (vocabulary); the padding is
  /// zero and is never written.
  bool pad_rows = false;
  /// This chunk's parameter repeats one that another stage writes (tied output layer on the last stage).
  bool copy = false;
  /// kNormal: random initialisation draws from N(0, init_method_std); kOne/kZero fill.
  enum class Init {
    kNormal,
    kScaledNormal /* std / sqrt(2 * layers) */,
    kOne,
    kZero,
    kKaimingUniform /* LoRA A */
  } init = Init::kNormal;
};

}  // namespace mcore_bridge
