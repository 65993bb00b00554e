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

/// How several Hugging Face tensors make one parameter. Split by rows (Shard::kColumn), each rank holds the layout of
/// its own rows; otherwise every rank holds that of all rows.
enum class Fuse {
  kNone,      ///< one tensor
  kQkv,       ///< {q, k, v}: rows grouped per key/value head, [q heads of the group | k | v]
  kSplitQkv,  ///< {q, k, v}: [its q rows ; its k rows ; its v rows], split by heads (whole-width q/k norms need it)
  kGateUp,    ///< {gate, up}: each rank holds [its gate rows ; its up rows]
  kGroups,    ///< rows grouped as WeightRule::grouping says: per group its rows of each part, one part after the other
  kInterleaved,  ///< parts that take turns row by row in one Hugging Face tensor (gpt-oss: even rows gate, odd rows
                 ///< up); each rank holds [its gate rows ; its up rows]
  kStack,        ///< one after the other along dim 0, each whole (LoRA A of a fused projection)
};

/// Sizes a kQkv or kSplitQkv rule needs.
struct HeadLayout {
  int64_t heads = 0, groups = 0, head_dim = 0;
  /// q holds twice the rows: per head its query rows, then its gate rows (attention_output_gate).
  bool output_gate = false;
  int64_t query_rows() const { return heads * head_dim * (output_gate ? 2 : 1); }
  int64_t key_rows() const { return groups * head_dim; }
};

/// Sizes a kGroups rule needs: GDN's in_proj groups [q | k | v | z | b | a] per key head.
struct RowGroups {
  int64_t groups = 0;
  std::vector<int64_t> part_rows;  ///< whole rows of each part, a multiple of `groups`; one per WeightRule::hf
};

/// Which experts a parameter holds, and how Hugging Face keeps them. Rows and columns of the rule are one expert's.
struct ExpertLayout {
  int64_t total = 0;             ///< experts of the layer; 0: no expert parameter
  int64_t first = 0, count = 0;  ///< this parameter holds experts [first, first + count)
  /// The parameter is [count, rows, cols]; otherwise count is 1 and it is one matrix ("weight{i}").
  bool grouped = false;
  /// Hugging Face keeps one tensor of all experts, [total, rows, cols]; otherwise one per expert, and "{e}" in the
  /// names stands for the expert's number.
  bool stacked = false;
};

struct WeightRule {
  std::string name;  ///< Megatron name inside one chunk, e.g. "decoder.layers.3.mlp.linear_fc2.weight"
  std::vector<std::string>
      hf;  ///< full Hugging Face names, one per fused part; an empty string: that part is absent (LoRA on q and v
           ///< only); a name that comes again: these parts follow one another in the rows of that one tensor
  int64_t rows = 0;  ///< whole (unsplit) rows of the parameter over all present parts: dim 0
  int64_t cols = 0;  ///< whole columns; 0 for a vector
  Shard shard = Shard::kReplicated;
  Fuse fuse = Fuse::kNone;
  HeadLayout heads = {};      ///< kQkv and kSplitQkv
  RowGroups grouping = {};    ///< kGroups
  ExpertLayout experts = {};  ///< split over the expert-tensor-parallel ranks instead of the tensor-parallel ones
  bool transposed = false;    ///< Hugging Face keeps the matrix as [cols, rows] (inputs first)
  /// Both sides keep the matrix as [rows, 1, cols] (the kernel of a depthwise convolution).
  bool depthwise = false;
  bool leading_one = false;  ///< Hugging Face keeps the vector as [1, rows] (ERNIE's correction bias)
  bool float32 = false;      ///< kept and stored in float32 whatever the model's precision
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
