#include "parallel/random.h"

#include <memory>
#include <optional>

#include "bindings/bindings.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

/// RandomScope as a `with` block.
struct RandomBlock {
  RandomStream stream;
  std::shared_ptr<ParallelState> parallel;
  c10::Device device;
  std::unique_ptr<RandomScope> scope;
};

RandomStream stream_named(const std::string& name) {
  MCB_CHECK(name == "split" || name == "replicated", "random_stream: '", name, "' is not one of split, replicated");
  return name == "split" ? RandomStream::kSplit : RandomStream::kReplicated;
}

}  // namespace

void init_random(py::module_& module) {
  py::class_<RandomBlock>(module, "RandomBlock")
      .def("__enter__",
           [](RandomBlock& block) {
             block.scope = std::make_unique<RandomScope>(block.stream, *block.parallel, block.device);
           })
      .def("__exit__", [](RandomBlock& block, const py::args&) { block.scope.reset(); });
  module.def("random_block",
             [](const std::string& stream, const std::shared_ptr<ParallelState>& parallel, const std::string& device) {
               return RandomBlock{stream_named(stream), parallel, c10::Device(device), nullptr};
             });
  module.def("reset_random_streams", &reset_random_streams);
  module.def(
      "random_state", [](const std::string& device) { return random_state(c10::Device(device)); },
      py::arg("device") = "cpu", "States of every random stream this process draws from");
  module.def(
      "set_random_state",
      [](const std::vector<at::Tensor>& states, const std::string& device) {
        set_random_state(c10::Device(device), states);
      },
      py::arg("states"), py::arg("device") = "cpu");
}

}  // namespace mcore_bridge
