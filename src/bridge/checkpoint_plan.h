// The plan of a checkpoint bound to this rank's tensors; what load, save and export loop over.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "layers/linear.h"
#include "mcore_bridge/bridge.h"
#include "mcore_bridge/materialised.h"
#include "parallel/parallel_state.h"
#include "plan/plan.h"

namespace mcore_bridge {

/// A local parameter and where its elements belong. `value()` is what gets written (merged when asked); `tensor` is the
/// parameter itself, which loading fills, unless it is FP8 codes of `in_fp8`, which takes and gives values of `dtype`.
struct PlannedParameter {
  ParameterPlan plan;
  at::Tensor tensor;
  std::function<at::Tensor()> value;
  c10::ScalarType dtype;             ///< of the values
  ParallelLinear* in_fp8 = nullptr;  ///< null: `tensor` holds the values
};

/// Which checkpoint is meant: the model's weights or one adapter.
struct Selection {
  bool peft_format = false;
  std::string adapter_name = "default";
  bool merge_lora = false;
};

/// Parameters of this rank's chunks in file order. KeyError when the adapter does not exist.
std::vector<PlannedParameter> planned_parameters(const Chunks& chunks, const Selection& selection);

/// The ranks that hold the same of a parameter.
const Group& replicas_of(const ParameterPlan& plan, const ParallelState& parallel);

/// planned_parameters less those that another rank of this copy of the model (ParallelState::model) stands for: experts
/// are spread wider than the rest, or the rest wider than the experts. Each element of the checkpoint is then owned
/// once in every copy.
std::vector<PlannedParameter> owned_parameters(const Chunks& chunks, const Selection& selection);

/// The selection's parameters in place while it lives. Collective.
std::unique_ptr<MaterialisedParameters> in_place(const Chunks& chunks, const Selection& selection);

/// Every tensor of the whole checkpoint in file order, the same on all ranks.
std::vector<HfTensor> whole_checkpoint(const Chunks& chunks, const Selection& selection);

/// Regions that this rank owns, by the name of the tensor.
struct OwnedRegion {
  const PlannedParameter* parameter;
  const Region* region;
};
std::map<std::string, std::vector<OwnedRegion>> owned_regions(const std::vector<PlannedParameter>& parameters);

}  // namespace mcore_bridge
