#include "bindings/bindings.h"
#include "core/caught_signal.h"

namespace mcore_bridge {

void init_signals(py::module_& module) {
  module.def("watch_signals", &watch_signals, py::arg("numbers"));
  module.def("unwatch_signals", &unwatch_signals);
  module.def("caught_signal", &caught_signal, "Number of the first signal caught since watch_signals(), 0 for none");
}

}  // namespace mcore_bridge
