#include "models/gathered_masters.h"

#include <ATen/ATen.h>

#include "models/gpt_model.h"

namespace mcore_bridge {

GatheredMasters::GatheredMasters(const Chunks& chunks) : chunks_(chunks) {
  std::vector<ParallelLinear*> layers;
  std::vector<std::shared_ptr<const WeightMasters>> masters;
  std::vector<int64_t> missing;
  for (const auto& chunk : chunks_) {
    for (const auto& [name, layer] : chunk->linears()) {
      if (!layer->weight_in_fp8()) continue;
      layers.push_back(layer);
      masters.push_back(layer->wide().masters());
      missing.push_back(masters.back() ? 0 : 1);
    }
  }
  if (layers.empty()) return;
  // A trainer may be gone on one rank and linger on another.
  auto any = at::tensor(missing, at::kLong);
  chunks_[0]->parallel().replicas(/*expert=*/false).all_reduce_max(any);
  for (size_t i = 0; i < layers.size(); ++i) {
    if (any[static_cast<int64_t>(i)].item<int64_t>() > 0) continue;
    const auto& codes = layers[i]->weight();
    const auto values = masters[i]->values(codes);
    if (layers[i]->wide().known(codes)) continue;  // written since the last step
    layers[i]->wide().keep(values, codes);
    gathered_.push_back(layers[i]);
  }
}

GatheredMasters::~GatheredMasters() {
  for (auto* layer : gathered_) layer->wide().forget();
}

}  // namespace mcore_bridge
