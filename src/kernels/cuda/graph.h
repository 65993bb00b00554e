// Device work recorded once and launched as one (CUDA graphs): what many small kernels cost to launch is paid once.
#pragma once

#include <functional>
#include <memory>

namespace mcore_bridge::cuda {

class Graph {
 public:
  virtual ~Graph() = default;
  /// Enqueues the recorded work on the current stream.
  virtual void replay() = 0;
};

/// Records on a stream of its own. Tensors made inside a recording live in a memory pool that all recordings of one
/// recorder share: none may be used outside, and recordings must not run at the same time.
class GraphRecorder {
 public:
  virtual ~GraphRecorder() = default;
  /// Runs `work` on the recorder's stream, behind what the current stream holds; the current stream goes on after it.
  /// Libraries make their handles, plans and workspaces when something runs for the first time, which cannot be
  /// recorded: work runs this way before it is recorded.
  virtual void run(const std::function<void()>& work) = 0;
  /// Calls `work`, and nothing of it runs: what it enqueues, on threads of autograd's as well, becomes the graph. Its
  /// kernels get the pointers and numbers of this call whenever they are replayed.
  virtual std::unique_ptr<Graph> record(const std::function<void()>& work) = 0;
};

/// Throws in a build without CUDA.
std::unique_ptr<GraphRecorder> make_graph_recorder(int device);

/// While a graph is recorded `work` becomes a branch beside what the current stream does next, joined before the
/// recording ends: for results that nothing else in the recording reads. Otherwise it runs in line. It holds the
/// tensors it reads by value.
void run_beside(std::function<void()> work);

/// The same for results that are read soon: what is returned must be called before, and lets the current stream wait.
[[nodiscard]] std::function<void()> run_aside(const std::function<void()>& work);

}  // namespace mcore_bridge::cuda
