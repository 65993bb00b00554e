#include "plan/initialize.h"

#include "bridge/checkpoint_plan.h"
#include "models/gpt_model.h"

namespace mcore_bridge {

void initialize(const Chunks& chunks, uint64_t seed) {
  const MaterialisedParameters whole(chunks);
  for (const auto& parameter : planned_parameters(chunks, {})) {
    const auto& config = chunks[0]->config();
    const auto values = parameter.in_fp8 ? parameter.value() : parameter.tensor;
    initialize_parameter(values, parameter.plan, seed, config.init_method_std, config.num_layers);
    if (parameter.in_fp8) parameter.in_fp8->set_weight_values(values);
  }
  note_weights_written(/*frozen=*/true);
}

}  // namespace mcore_bridge
