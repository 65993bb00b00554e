#include "bindings/bindings.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

void translate(std::exception_ptr pointer) {
  auto raise = [](PyObject* type, const std::exception& error) { PyErr_SetString(type, error.what()); };
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const KeyError& error) {
    raise(PyExc_KeyError, error);
  } catch (const FileNotFoundError& error) {
    raise(PyExc_FileNotFoundError, error);
  } catch (const IoError& error) {
    raise(PyExc_OSError, error);
  } catch (const NonFiniteError& error) {
    raise(PyExc_FloatingPointError, error);
  } catch (const ValueError& error) {
    raise(PyExc_ValueError, error);
  } catch (const c10::Error& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what_without_backtrace());
  }
}

}  // namespace
}  // namespace mcore_bridge

PYBIND11_MODULE(_core, module) {
  using namespace mcore_bridge;
  module.doc() = "The C++ engine. Use it through mcore_bridge.";
  py::register_exception_translator(translate);
  init_config(module);
  init_parallel(module);
  init_random(module);
  init_signals(module);
  init_model(module);
  init_bridge(module);
  init_convert(module);
  init_train(module);
  init_training_checkpoint(module);
  init_schedule(module);
  init_kernels(module);
  init_planner(module);
}
