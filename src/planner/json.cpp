#include "mcore_bridge/planner.h"

namespace mcore_bridge {

Json to_json(const Plan& plan) {
  const auto& l = plan.layout;
  Json stages = Json::array();
  for (const auto& stage : plan.stages) {
    const auto& m = stage.memory;
    Json traffic = Json::object();
    for (const auto& [group, operations] : stage.traffic) {
      for (const auto& [operation, count] : operations)
        traffic[group][operation] = {{"calls", count.calls}, {"bytes", count.bytes}, {"wire_bytes", count.wire_bytes}};
    }
    stages.push_back({{"stage", stage.stage},
                      {"first_layer", stage.layers.first},
                      {"layers", stage.layers.count},
                      {"parameters", stage.parameters},
                      {"trainable", stage.trainable},
                      {"in_flight", stage.in_flight},
                      {"forward_flops", stage.forward_flops},
                      {"backward_flops", stage.backward_flops},
                      {"memory",
                       {{"weights", m.weights},
                        {"gradients", m.gradients},
                        {"optimizer", m.optimizer},
                        {"activations", m.activations},
                        {"workspace", m.workspace},
                        {"communication", m.communication},
                        {"reserve", m.reserve},
                        {"total", m.total()}}},
                      {"offloaded", m.offloaded},
                      {"communication", traffic}});
  }
  const auto& t = plan.time;
  Json explanation = Json::array();
  for (const auto& [name, text] : plan.explanation) explanation.push_back({name, text});
  return {{"layout",
           {{"tensor_model_parallel_size", l.tensor},
            {"pipeline_model_parallel_size", l.pipeline},
            {"virtual_pipeline_model_parallel_size", l.virtual_pipeline},
            {"context_parallel_size", l.context},
            {"expert_model_parallel_size", l.expert},
            {"data_parallel_size", l.data()},
            {"sequence_parallel", plan.sequence_parallel},
            {"account_for_embedding_and_loss_in_pipeline_split", l.account},
            {"recompute_granularity", plan.recompute},
            {"micro_batch_size", l.run.micro_batch_size},
            {"global_batch_size", l.run.global_batch_size},
            {"micro_batches", plan.micro_batches}}},
          {"fits", plan.fits},
          {"worst_stage", plan.worst},
          {"stages", stages},
          {"bubble_fraction", plan.bubble_fraction},
          {"seconds",
           {{"compute", t.compute},
            {"tensor", t.tensor},
            {"context", t.context},
            {"expert", t.expert},
            {"pipeline", t.pipeline},
            {"bubble", t.bubble},
            {"data", t.data},
            {"optimizer", t.optimizer},
            {"step", t.step()}}},
          {"tokens_per_second", plan.tokens_per_second},
          {"model_flops", plan.model_flops},
          {"mfu", plan.mfu},
          {"explanation", explanation}};
}

}  // namespace mcore_bridge
