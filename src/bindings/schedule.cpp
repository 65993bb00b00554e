#include "mcore_bridge/schedule.h"

#include "bindings/bindings.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

const char* kind_name(Action::Kind kind) {
  switch (kind) {
    case Action::Kind::kForward:
      return "forward";
    case Action::Kind::kBackward:
      return "backward";
    case Action::Kind::kBackwardInput:
      return "backward_input";
    case Action::Kind::kBackwardWeight:
      return "backward_weight";
    case Action::Kind::kStart:
      return "start";
    case Action::Kind::kWait:
      return "wait";
  }
  return "";
}

}  // namespace

void init_schedule(py::module_& module) {
  using Message = Action::Message;
  py::class_<Message>(module, "Message")
      .def_readonly("send", &Message::send)
      .def_readonly("gradient", &Message::gradient)
      .def_readonly("chunk", &Message::chunk)
      .def_readonly("micro_batch", &Message::micro_batch)
      .def_readonly("peer", &Message::peer);
  py::class_<Action>(module, "Action")
      .def_property_readonly("kind", [](const Action& action) { return kind_name(action.kind); })
      .def_readonly("chunk", &Action::chunk)
      .def_readonly("micro_batch", &Action::micro_batch)
      .def_readonly("messages", &Action::messages);
  py::class_<Simulation::Span>(module, "Span")
      .def_readonly("stage", &Simulation::Span::stage)
      .def_property_readonly("kind", [](const Simulation::Span& span) { return kind_name(span.kind); })
      .def_readonly("chunk", &Simulation::Span::chunk)
      .def_readonly("micro_batch", &Simulation::Span::micro_batch)
      .def_readonly("start", &Simulation::Span::start)
      .def_readonly("end", &Simulation::Span::end);
  py::class_<Simulation>(module, "Simulation")
      .def_readonly("time", &Simulation::time)
      .def_readonly("bubble_fraction", &Simulation::bubble_fraction)
      .def_readonly("peak_activations", &Simulation::peak_activations)
      .def_readonly("peak_memory", &Simulation::peak_memory)
      .def_readonly("spans", &Simulation::spans);

  module.def(
      "make_schedule",
      [](const std::string& name, int stages, int chunks, int micro_batches, int group_size) {
        return make_schedule({.name = name,
                              .stages = stages,
                              .chunks = chunks,
                              .micro_batches = micro_batches,
                              .group_size = group_size});
      },
      py::arg("name"), py::arg("stages"), py::arg("chunks") = 1, py::arg("micro_batches") = 1,
      py::arg("group_size") = 0, "The table: one list of Actions per pipeline stage", NoGil());
  module.def(
      "simulate_schedule",
      [](const std::vector<StageSchedule>& schedule, double forward, double backward_input, double backward_weight,
         double exchange) {
        const ChunkCost cost{.forward = forward, .backward_input = backward_input, .backward_weight = backward_weight};
        return simulate(schedule, {.chunks = {cost}, .exchange = exchange});
      },
      py::arg("schedule"), py::arg("forward") = 1.0, py::arg("backward_input") = 1.0, py::arg("backward_weight") = 1.0,
      py::arg("exchange") = 0.0, "Plays a table; the same costs for every chunk", NoGil());
}

}  // namespace mcore_bridge
