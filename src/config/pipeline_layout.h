// Which chunk of the pipeline holds what. Everything that asks "which layers are where" asks here.
#pragma once

#include <string>
#include <vector>

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

/// One chunk: a virtual stage of one pipeline rank.
struct ChunkLayout {
  LayerRange layers;  ///< may be empty
  bool embedding = false, loss = false;
};

/// All chunks in the order a token visits them: chunk c is virtual stage c / pp of pipeline rank c % pp. Throws
/// ValueError when the sizes do not fit together; the text names layouts that do.
///
/// By precedence: pipeline_model_parallel_layout; num_layers_in_first/last_pipeline_stage, each split evenly over the
/// rank's chunks, the other ranks evenly over the rest; else even, embedding and loss counted as layers if asked.
/// Source: Megatron-LM, megatron/core/transformer/transformer_block.py and pipeline_parallel_layer_layout.py.
std::vector<ChunkLayout> pipeline_layout(const ModelConfig& config);

/// The stages of a layout in Megatron's notation, one string of E, t, m and L each: `Et*3|(tt|)*2tL` gives Ettt, tt, tt
/// and tL. Commas and spaces mean nothing. A list is taken too: an entry per stage, either such a string or a list of
/// embedding, decoder, mtp, loss (or their letters).
std::vector<std::string> parse_pipeline_layout(const Json& layout);

/// Layers spread over `chunks` as evenly as can be (outer chunks, which hold embedding and loss, get fewer), as a
/// layout.
std::string even_layout(int64_t num_layers, int64_t chunks);

/// Fills virtual_pipeline_model_parallel_size from the layout or num_layers_per_virtual_pipeline_stage.
void derive_virtual_stages(ModelConfig& config);

/// Every rule about stages, chunks and schedules.
void check_pipeline(const ModelConfig& config);

}  // namespace mcore_bridge
