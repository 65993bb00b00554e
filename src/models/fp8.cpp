#include "models/fp8.h"

#include <ATen/ATen.h>

#include "mcore_bridge/error.h"
#include "models/gpt_model.h"

namespace mcore_bridge {
namespace {

constexpr std::string_view kLayers = "decoder.layers.";

/// The decoder layer of the whole model that a module is in, -1 for none.
int64_t layer_of(const GPTModel& model, const std::string& name) {
  if (!name.starts_with(kLayers)) return -1;
  return std::stoll(name.substr(kLayers.size())) + model.place().layers.first;
}

std::string global_name(const GPTModel& model, const std::string& name) {
  return std::string(kLayers) + std::to_string(layer_of(model, name)) + name.substr(name.find('.', kLayers.size()));
}

bool wants_fp8(const ModelConfig& config, int64_t layer) {
  if (layer < 0) return false;
  return !config.first_last_layers_bf16 ||
         (layer >= config.num_layers_at_start_in_bf16 && layer < config.num_layers - config.num_layers_at_end_in_bf16);
}

/// f(name in the whole model, layer) for every layer with a history.
template <class F>
void for_each_history(const Chunks& chunks, F f) {
  for (const auto& chunk : chunks) {
    for (const auto& [name, layer] : chunk->linears()) {
      if (layer->fp8() && layer->fp8()->options().history) f(global_name(*chunk, name), layer->fp8()->options());
    }
  }
}

}  // namespace

void set_up_fp8(GPTModel& model) {
  const auto& config = model.config();
  if (!config.fp8) return;
  Fp8Options options{.hybrid = *config.fp8 == "hybrid"};
  options.recipe = config.fp8_recipe == "delayed"     ? Fp8Recipe::kDelayed
                   : config.fp8_recipe == "blockwise" ? Fp8Recipe::kBlockwise
                                                      : Fp8Recipe::kTensorwise;
  std::vector<GPTModel::NamedLinear> layers;
  for (const auto& linear : model.linears()) {
    if (wants_fp8(config, layer_of(model, linear.name))) layers.push_back(linear);
  }
  if (options.recipe == Fp8Recipe::kDelayed && !layers.empty())
    options.history = std::make_shared<AmaxHistory>(Fp8Linear::kSlots * static_cast<int64_t>(layers.size()),
                                                    config.fp8_amax_history_len,
                                                    config.fp8_amax_compute_algo == "most_recent", model.device());
  for (const auto& [name, layer] : layers) {
    layer->set_fp8(global_name(model, name), options);
    options.first_slot += Fp8Linear::kSlots;
  }
}

void store_weights_in_fp8(const ModelConfig& config, int64_t number, Module& layer) {
  if (!config.fp8_param || !wants_fp8(config, number)) return;
  if (auto* linear = dynamic_cast<ParallelLinear*>(&layer)) linear->store_weight_in_fp8();
  for (const auto& child : layer.children()) store_weights_in_fp8(config, number, *child.module);
}

void update_fp8_scales(const Chunks& chunks) {
  const AmaxHistory* last = nullptr;
  for_each_history(chunks, [&](const std::string&, const Fp8Options& options) {
    if (options.history.get() == last) return;
    last = options.history.get();
    const auto& parallel = chunks.at(0)->parallel();
    options.history->update({parallel.tp, parallel.dp_cp});
  });
}

std::map<std::string, at::Tensor> fp8_history(const Chunks& chunks) {
  std::map<std::string, at::Tensor> result;
  for_each_history(chunks, [&](const std::string& name, const Fp8Options& options) {
    result[name] = options.history->values().narrow(0, options.first_slot, Fp8Linear::kSlots);
  });
  return result;
}

void set_fp8_history(const Chunks& chunks, const std::map<std::string, at::Tensor>& history) {
  std::map<std::shared_ptr<AmaxHistory>, at::Tensor> values;
  for_each_history(chunks, [&](const std::string& name, const Fp8Options& options) {
    const auto& own = options.history->values();
    auto& all = values[options.history];
    if (!all.defined()) all = at::zeros_like(own);
    const auto found = history.find(name);
    if (found == history.end()) return;
    MCB_CHECK(found->second.dim() == 2 && found->second.size(0) == Fp8Linear::kSlots && found->second.size(1) > 0,
              "set_fp8_history: ", name, " is ", found->second.sizes(), ", needs [", Fp8Linear::kSlots, ", steps]");
    const auto length = std::min(own.size(1), found->second.size(1));
    all.narrow(0, options.first_slot, Fp8Linear::kSlots).narrow(1, 0, length).copy_(found->second.narrow(1, 0, length));
  });
  for (const auto& [own, all] : values) own->restore(all);
}

void forget_wide_weights(const Chunks& chunks) {
  for (const auto& chunk : chunks) {
    for (const auto& [name, layer] : chunk->linears()) {
      if (layer->weight_in_fp8() && layer->wide().in_memory()) layer->wide().forget();
    }
  }
}

void drop_fp8_weights(const Chunks& chunks) {
  for (const auto& chunk : chunks) {
    for (const auto& [name, layer] : chunk->linears()) {
      if (layer->fp8()) layer->fp8()->keep_weight(false);
    }
  }
}

}  // namespace mcore_bridge
