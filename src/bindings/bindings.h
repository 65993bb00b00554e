// Each area of the Python module is one file with one init function.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;

void init_config(py::module_& module);
void init_parallel(py::module_& module);
void init_random(py::module_& module);
void init_signals(py::module_& module);
void init_model(py::module_& module);
void init_bridge(py::module_& module);
void init_convert(py::module_& module);
void init_train(py::module_& module);
void init_training_checkpoint(py::module_& module);
void init_schedule(py::module_& module);
void init_kernels(py::module_& module);
void init_planner(py::module_& module);

}  // namespace mcore_bridge
