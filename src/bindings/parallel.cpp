#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "bindings/bindings.h"
#include "mcore_bridge/communication.h"
#include "mcore_bridge/error.h"
#include "parallel/flight_recorder.h"
#include "parallel/parallel_state.h"

namespace mcore_bridge {
namespace {

using py::literals::operator""_a;

GroupKind kind_named(const std::string& name) {
  for (const auto kind : all_group_kinds()) {
    if (name == group_name(kind)) return kind;
  }
  fail<KeyError>("no group is called ", name);
}

using GroupParts = std::pair<c10::intrusive_ptr<c10d::ProcessGroup>, std::vector<int>>;

}  // namespace

void init_parallel(py::module_& module) {
  py::class_<RankCoordinates>(module, "RankCoordinates")
      .def_readonly("tp", &RankCoordinates::tp)
      .def_readonly("cp", &RankCoordinates::cp)
      .def_readonly("dp", &RankCoordinates::dp)
      .def_readonly("pp", &RankCoordinates::pp)
      .def_readonly("etp", &RankCoordinates::etp)
      .def_readonly("ep", &RankCoordinates::ep)
      .def_readonly("edp", &RankCoordinates::edp);

  py::class_<Topology>(module, "Topology")
      .def(py::init([](int world_size, int tensor, int pipeline, int virtual_pipeline, int context, int expert,
                       int expert_tensor) {
             return Topology({.tensor = tensor,
                              .pipeline = pipeline,
                              .virtual_pipeline = virtual_pipeline,
                              .context = context,
                              .expert = expert,
                              .expert_tensor = expert_tensor},
                             world_size);
           }),
           py::arg("world_size"), py::kw_only(), py::arg("tensor") = 1, py::arg("pipeline") = 1,
           py::arg("virtual_pipeline") = 1, py::arg("context") = 1, py::arg("expert") = 1, py::arg("expert_tensor") = 1)
      .def("coordinates", &Topology::coordinates)
      .def_property_readonly("world_size", &Topology::world_size)
      .def_property_readonly("data", [](const Topology& topology) { return topology.sizes().data; })
      .def("groups",
           [](const Topology& topology, const std::string& kind) { return topology.groups(kind_named(kind)); })
      .def("group_of", [](const Topology& topology, const std::string& kind, int rank) {
        return topology.group_of(kind_named(kind), rank);
      });

  module.def("flight_records", &flight_records, NoGil());

  module.def("group_names", [] {
    std::vector<std::string> names;
    for (const auto kind : all_group_kinds()) names.emplace_back(group_name(kind));
    return names;
  });

  module.def("communication_volume", [] {
    py::dict result;
    for (const auto& [kind, operations] : communication_volume()) {
      py::dict inner;
      for (const auto& [name, count] : operations) {
        inner[name.c_str()] = py::dict("calls"_a = count.calls, "bytes"_a = count.bytes,
                                       "wire_bytes"_a = count.wire_bytes, "ranks"_a = count.ranks);
      }
      result[kind.c_str()] = inner;
    }
    return result;
  });
  module.def("reset_communication_volume", &reset_communication_volume);

  py::class_<ParallelState, std::shared_ptr<ParallelState>>(module, "ParallelState")
      .def_static("create",
                  [](const Topology& topology, int rank, const std::map<std::string, GroupParts>& parts) {
                    std::map<GroupKind, Group> groups;
                    for (const auto& [name, part] : parts) {
                      const auto& ranks = part.second;
                      const auto place = std::find(ranks.begin(), ranks.end(), rank);
                      MCB_CHECK(place != ranks.end(), "group ", name, " does not hold rank ", rank);
                      groups.emplace(kind_named(name), Group(part.first, ranks, static_cast<int>(place - ranks.begin()),
                                                             kind_named(name)));
                    }
                    return std::const_pointer_cast<ParallelState>(ParallelState::create(topology, rank, groups));
                  })
      .def_static("single", [] { return std::const_pointer_cast<ParallelState>(ParallelState::single()); })
      .def_readonly("place", &ParallelState::place)
      .def_readonly("topology", &ParallelState::topology)
      .def_readonly("rank", &ParallelState::rank);
}

}  // namespace mcore_bridge
