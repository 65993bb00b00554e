#include "kernels/cuda/graph.h"

#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#include "mcore_bridge/error.h"

namespace mcore_bridge::cuda {
namespace {

using at::cuda::CUDAEvent;
using at::cuda::CUDAStream;
using c10::cuda::CUDAStreamGuard;

class Recording : public Graph {
 public:
  void replay() override { graph.replay(); }
  at::cuda::CUDAGraph graph;
};

/// The streams of a recording beside its first: one for what is joined at its end, one for what is joined soon.
class Branches {
 public:
  Branches(CUDAStream stream, CUDAStream aside) : stream_(stream), aside_(aside) {}

  void add(std::function<void()> work) {
    const std::lock_guard lock(mutex_);
    const auto current = c10::cuda::getCurrentCUDAStream(stream_.device_index());
    fork(current, stream_, work);
    auto& branch = pending_.emplace_back();
    branch.end.record(stream_);
    branch.work = std::move(work);
    if (pending_.size() > kPending) finish_first(current);
  }

  std::function<void()> aside(const std::function<void()>& work) {
    const std::lock_guard lock(mutex_);
    fork(c10::cuda::getCurrentCUDAStream(aside_.device_index()), aside_, work);
    auto end = std::make_shared<CUDAEvent>();
    end->record(aside_);
    return [end] { end->block(c10::cuda::getCurrentCUDAStream(end->device_index())); };
  }

  void join(CUDAStream main) {
    const std::lock_guard lock(mutex_);
    while (!pending_.empty()) finish_first(main);
  }

 private:
  static constexpr size_t kPending = 4;
  struct Branch {
    CUDAEvent end;
    std::function<void()> work;  ///< keeps what it reads
  };

  static void fork(CUDAStream from, CUDAStream to, const std::function<void()>& work) {
    CUDAEvent here;
    here.record(from);
    here.block(to);
    const CUDAStreamGuard guard(to);
    work();
  }

  void finish_first(CUDAStream stream) {
    pending_.front().end.block(stream);
    pending_.pop_front();
  }

  CUDAStream stream_, aside_;
  std::mutex mutex_;
  std::deque<Branch> pending_;
};

std::atomic<Branches*> recording{nullptr};  // backward runs on threads of its own

class Recorder : public GraphRecorder {
 public:
  explicit Recorder(int device)
      : device_(static_cast<c10::DeviceIndex>(device)),
        main_(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device_)),
        aside_(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device_)),
        side_(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device_)),
        pool_(at::cuda::graph_pool_handle()) {}

  void run(const std::function<void()>& work) override {
    const auto outside = c10::cuda::getCurrentCUDAStream(device_);
    order(outside, main_);
    {
      const CUDAStreamGuard guard(main_);
      work();
    }
    order(main_, outside);
  }

  std::unique_ptr<Graph> record(const std::function<void()>& work) override {
    auto result = std::make_unique<Recording>();
    // What runs before were given is of no more use, the recording's pool needs as much.
    c10::cuda::device_synchronize();
    c10::cuda::CUDACachingAllocator::emptyCache();
    const CUDAStreamGuard guard(main_);
    Branches branches(side_, aside_);
    // Other threads, loaders of data for example, may go on with what they do.
    result->graph.capture_begin(pool_, cudaStreamCaptureModeThreadLocal);
    recording = &branches;
    try {
      work();
      branches.join(main_);
      recording = nullptr;
      result->graph.capture_end();
    } catch (const std::exception& error) {
      recording = nullptr;
      abandon();
      fail<Error>("recording a CUDA graph failed: ", error.what(), "\nTrain with cuda_graph_impl none.");
    }
    return result;
  }

 private:
  static void order(CUDAStream first, CUDAStream second) {
    CUDAEvent event;
    event.record(first);
    event.block(second);
  }

  void abandon() const {
    cudaGraph_t rest = nullptr;
    if (cudaStreamEndCapture(main_, &rest) == cudaSuccess && rest) static_cast<void>(cudaGraphDestroy(rest));
    static_cast<void>(cudaGetLastError());
    c10::cuda::CUDACachingAllocator::endAllocateToPool(device_, pool_);
  }

  c10::DeviceIndex device_;
  CUDAStream main_, aside_, side_;
  at::cuda::MempoolId_t pool_;
};

}  // namespace

std::unique_ptr<GraphRecorder> make_graph_recorder(int device) { return std::make_unique<Recorder>(device); }

void run_beside(std::function<void()> work) {
  if (auto* branches = recording.load()) return branches->add(std::move(work));
  work();
}

std::function<void()> run_aside(const std::function<void()>& work) {
  if (auto* branches = recording.load()) return branches->aside(work);
  work();
  return [] {};
}

}  // namespace mcore_bridge::cuda
