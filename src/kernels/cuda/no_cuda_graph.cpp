// Stands in for with_torch/graph.cpp in a build without CUDA.
#include "kernels/cuda/graph.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge::cuda {

std::unique_ptr<GraphRecorder> make_graph_recorder(int) {
  fail("cuda_graph_impl: this build has no CUDA; build with MCB_CUDA=ON, or train with cuda_graph_impl none");
}

void run_beside(std::function<void()> work) { work(); }

std::function<void()> run_aside(const std::function<void()>& work) {
  work();
  return [] {};
}

}  // namespace mcore_bridge::cuda
