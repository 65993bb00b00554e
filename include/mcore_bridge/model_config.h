// What a model is: the fields of model_config.def, filled from a Hugging Face config or by hand, then validated.
#pragma once

#include <c10/core/ScalarType.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "mcore_bridge/topology.h"

namespace mcore_bridge {

using Json = nlohmann::json;
using OptInt = std::optional<int64_t>;
using OptDouble = std::optional<double>;
using OptString = std::optional<std::string>;
using IntList = std::vector<int64_t>;
using DoubleList = std::vector<double>;
using StringList = std::vector<std::string>;
using DType = c10::ScalarType;

/// Per-layer 0/1 flags given as N, "N", a list, or a pattern such as "[0]*3+[1]*45". Empty: not given.
/// An integer N means 0 on every N-th layer and 1 elsewhere for window_attn_skip_freq, and Megatron's
/// [0]*(N-1)+[1] for no_rope_freq; `expand` is told which.
struct Pattern {
  OptInt every;
  IntList list;
  bool empty() const { return !every && list.empty(); }
  /// One flag per layer; `nth` is the flag of every N-th layer, the others get 1 - nth.
  IntList expand(int64_t num_layers, int64_t nth, const char* field) const;
};

/// pipeline_model_parallel_layout: what each stage holds, a string of E (embedding), t (decoder layer), m (MTP layer)
/// and L (loss) per stage, in the order a token visits them. Empty: not given.
struct StageLayout {
  std::vector<std::string> stages;
  bool empty() const { return stages.empty(); }
  std::string text() const;  ///< joined by |
};

struct ModelConfig {
#define MCB_FIELD(type, name, default_value, doc) type name = default_value;
#include "mcore_bridge/model_config.def"
#undef MCB_FIELD

  /// Fills derived fields, then throws ValueError listing the first value that is out of range or contradicts another.
  void finalize();

  int64_t query_groups() const { return num_query_groups.value_or(num_attention_heads); }
  int64_t head_dim() const { return kv_channels.value_or(num_attention_heads ? hidden_size / num_attention_heads : 0); }
  bool has_window(int64_t layer) const;  ///< sliding window in this (global) layer
  bool has_rope(int64_t layer) const;    ///< RoPE in this (global) layer
  bool is_moe() const { return num_moe_experts.has_value(); }
  bool is_moe_layer(int64_t layer) const;  ///< experts in this (global) layer
  int64_t moe_ffn_size() const { return moe_ffn_hidden_size.value_or(ffn_hidden_size); }
  int64_t shared_expert_size() const { return moe_shared_expert_intermediate_size.value_or(0); }
  bool recomputes(const std::string& module) const;  ///< recompute_granularity selective names it
  int64_t virtual_stages() const { return virtual_pipeline_model_parallel_size.value_or(1); }
  ParallelSizes parallel_sizes() const;  ///< data stays 1: the world decides it

  /// Global layers of one chunk (vp_stage 0 unless the pipeline is interleaved).
  LayerRange layers_of(int pp_rank, int vp_stage) const;

  /// Keys are field names; an unknown key is an error that names the nearest field.
  static ModelConfig from_json(const Json& values);
  Json to_json() const;

  /// The Hugging Face config.json as ModelConfig fields (only those it determines), ready for from_json.
  static Json from_hf(const Json& hf_config);
  /// from_hf of `folder`/config.json, finalized, with `overrides` on top.
  static ModelConfig from_folder(const std::string& folder, const Json& overrides = Json::object());
};

/// [{name, type, default, doc}] for bindings, CLI and documentation.
Json config_fields();

}  // namespace mcore_bridge
