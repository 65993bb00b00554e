#include "plan/initialize.h"

#include "bridge/checkpoint_plan.h"
#include "models/gpt_model.h"

namespace mcore_bridge {

void initialize(const Chunks& chunks, uint64_t seed) {
  const MaterialisedParameters whole(chunks);
  for (const auto& parameter : planned_parameters(chunks, {})) {
    const auto& config = chunks[0]->config();
    initialize_parameter(parameter.tensor, parameter.plan, seed, config.init_method_std, config.num_layers);
  }
  note_weights_written(/*frozen=*/true);
}

}  // namespace mcore_bridge
