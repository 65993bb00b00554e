#include "kernels/cudnn/attention.h"

// The library is found at run time, where torch's own is loaded already.
#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#include <cuda_runtime_api.h>
#include <cudnn_frontend.h>
#include <dlfcn.h>

#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <unordered_map>
#include <utility>

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;
}

namespace mcore_bridge::cudnn {
namespace {

namespace fe = cudnn_frontend;
using TensorPtr = std::shared_ptr<fe::graph::Tensor_attributes>;

enum Uid : int64_t {
  kQ = 1,
  kK,
  kV,
  kOut,
  kStatistics,
  kGradOut,
  kGradQ,
  kGradK,
  kGradV,
  kLengthsQ,
  kLengthsK,
  kOffsetsQ,
  kOffsetsK,
  kOffsetsV,
  kOffsetsOut,
  kOffsetsStatistics,
  kOffsetsGrad,
};

void check(fe::error_t error, const char* what) {
  if (error.is_bad()) throw std::runtime_error(std::string("cuDNN attention: ") + what + ": " + error.get_message());
}

struct Plan {
  fe::graph::Graph graph;
  int64_t workspace = 0;
};

using Key = std::tuple<int, bool, Attention>;

/// One handle a device; used under the lock, which only the host waits for.
struct Plans {
  std::mutex mutex;
  std::map<int, cudnnHandle_t> handles;
  std::map<Key, std::unique_ptr<Plan>> plans;
};
Plans& plans() {
  static auto* instance = new Plans;  // lives on: cuDNN may be gone when statics go
  return *instance;
}

int current_device() {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) throw std::runtime_error("cuDNN attention: no CUDA device");
  return device;
}

cudnnHandle_t handle_of(Plans& all, int device) {
  auto& handle = all.handles[device];
  if (!handle && fe::detail::create_handle(&handle) != CUDNN_STATUS_SUCCESS)
    throw std::runtime_error("cuDNN attention: no handle");
  return handle;
}

/// Builds the graph of one shape.
class Builder {
 public:
  Builder(Plan& plan, const Attention& shape) : graph_(plan.graph), shape_(shape) {
    graph_.set_io_data_type(shape.half ? fe::DataType_t::HALF : fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    q_ = input("q", kQ, shape.heads, shape.q, kOffsetsQ);
    k_ = input("k", kK, shape.groups, shape.k, kOffsetsK);
    v_ = input("v", kV, shape.groups, shape.v, kOffsetsV);
  }

  void forward() {
    auto options = fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(true);
    mask(options);
    auto [out, statistics] = graph_.sdpa(q_, k_, v_, options);
    output(out, kOut, shape_.heads, shape_.out, kOffsetsOut);
    statistics->set_output(true);
    describe_statistics(statistics);
  }

  void backward() {
    auto options = fe::graph::SDPA_backward_attributes().set_name("attention_backward");
    mask(options);
    options.set_deterministic_algorithm(shape_.deterministic);
    if (shape_.total > 0) options.set_max_total_seq_len_q(shape_.total).set_max_total_seq_len_kv(shape_.total);
    const auto out = input("out", kOut, shape_.heads, shape_.out, kOffsetsOut);
    const auto grad = input("grad_out", kGradOut, shape_.heads, shape_.out, kOffsetsOut);
    const auto statistics = graph_.tensor(fe::graph::Tensor_attributes().set_name("statistics"));
    describe_statistics(statistics);
    auto [grad_q, grad_k, grad_v] = graph_.sdpa_backward(q_, k_, v_, out, grad, statistics, options);
    output(grad_q, kGradQ, shape_.heads, shape_.grad_q, kOffsetsQ);
    output(grad_k, kGradK, shape_.groups, shape_.grad_k, kOffsetsGrad);
    output(grad_v, kGradV, shape_.groups, shape_.grad_v, kOffsetsGrad);
  }

 private:
  TensorPtr numbers(const char* name, int64_t uid, int64_t count) {
    auto& known = numbers_[uid];
    if (!known)
      known = graph_.tensor(fe::graph::Tensor_attributes()
                                .set_name(name)
                                .set_uid(uid)
                                .set_dim({count, 1, 1, 1})
                                .set_stride({1, 1, 1, 1})
                                .set_data_type(fe::DataType_t::INT32));
    return known;
  }
  TensorPtr offsets(int64_t uid) { return numbers("offsets", uid, shape_.batch + 1); }

  std::vector<int64_t> sizes(int64_t heads) const { return {shape_.batch, heads, shape_.length, shape_.width}; }
  std::vector<int64_t> strides(const Attention::Strides& s) const {
    // Of ragged rows only offsets say where a row begins; the batch's stride has to look like a packed one.
    return {shape_.total > 0 ? s.token * shape_.length : s.batch, s.head, s.token, 1};
  }

  TensorPtr input(const char* name, int64_t uid, int64_t heads, const Attention::Strides& s, int64_t offsets_uid) {
    auto tensor = graph_.tensor(
        fe::graph::Tensor_attributes().set_name(name).set_uid(uid).set_dim(sizes(heads)).set_stride(strides(s)));
    if (shape_.total > 0) tensor->set_ragged_offset(offsets(offsets_uid));
    return tensor;
  }
  void output(const TensorPtr& tensor, int64_t uid, int64_t heads, const Attention::Strides& s, int64_t offsets_uid) {
    tensor->set_output(true).set_uid(uid).set_dim(sizes(heads)).set_stride(strides(s));
    if (shape_.total > 0) tensor->set_ragged_offset(offsets(offsets_uid));
  }
  void describe_statistics(const TensorPtr& tensor) {
    const auto [b, h, s] = std::tuple{shape_.batch, shape_.heads, shape_.length};
    tensor->set_uid(kStatistics).set_data_type(fe::DataType_t::FLOAT).set_dim({b, h, s, 1});
    if (shape_.total > 0) {
      tensor->set_stride({h * s, 1, h, 1}).set_ragged_offset(offsets(kOffsetsStatistics));
    } else {
      tensor->set_stride({h * s, s, 1, 1});
    }
  }

  template <class Options>
  void mask(Options& options) {
    options.set_attn_scale(static_cast<float>(1 / std::sqrt(static_cast<double>(shape_.width))));
    options.set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
    if (shape_.window_left >= 0) options.set_diagonal_band_left_bound(static_cast<int>(shape_.window_left + 1));
    if (shape_.total > 0)
      options.set_padding_mask(true)
          .set_seq_len_q(numbers("lengths_q", kLengthsQ, shape_.batch))
          .set_seq_len_kv(numbers("lengths_k", kLengthsK, shape_.batch));
  }

  fe::graph::Graph& graph_;
  const Attention& shape_;
  TensorPtr q_, k_, v_;
  std::map<int64_t, TensorPtr> numbers_;
};

/// `all` is locked.
Plan& plan_of(Plans& all, int device, const Attention& shape, bool backward) {
  auto& plan = all.plans[{device, backward, shape}];
  if (plan) return *plan;
  auto made = std::make_unique<Plan>();
  Builder builder(*made, shape);
  backward ? builder.backward() : builder.forward();
  check(made->graph.build(handle_of(all, device), {fe::HeurMode_t::A}), backward ? "backward" : "forward");
  check(made->graph.get_workspace_size(made->workspace), "workspace");
  plan = std::move(made);
  return *plan;
}

void execute(const Attention& shape, const Tensors& t, bool backward, void* workspace, void* stream) {
  auto& all = plans();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto device = current_device();
  auto& plan = plan_of(all, device, shape, backward);
  auto at = [](const void* p) { return const_cast<void*>(p); };
  std::unordered_map<int64_t, void*> pointers{
      {kQ, at(t.q)}, {kK, at(t.k)}, {kV, at(t.v)}, {kOut, t.out}, {kStatistics, t.statistics}};
  if (backward) {
    pointers.insert({{kGradOut, at(t.grad_out)}, {kGradQ, t.grad_q}, {kGradK, t.grad_k}, {kGradV, t.grad_v}});
  }
  if (shape.total > 0) {
    const auto& o = t.offsets;
    pointers.insert({{kLengthsQ, at(o.lengths)},
                     {kLengthsK, at(o.lengths)},
                     {kOffsetsQ, at(o.q)},
                     {kOffsetsK, at(o.k)},
                     {kOffsetsV, at(o.v)},
                     {kOffsetsOut, at(o.out)},
                     {kOffsetsStatistics, at(o.statistics)}});
    if (backward) pointers.emplace(kOffsetsGrad, at(o.grad_k));
  }
  const auto handle = handle_of(all, device);
  if (fe::detail::set_stream(handle, static_cast<cudaStream_t>(stream)) != CUDNN_STATUS_SUCCESS)
    throw std::runtime_error("cuDNN attention: stream");
  check(plan.graph.execute(handle, pointers, workspace), backward ? "backward" : "forward");
}

}  // namespace

bool available() {
  static const bool result = [] {
    for (const auto* name : {"libcudnn.so.9", "libcudnn.so"}) {
      if ((fe::cudnn_dlhandle = dlopen(name, RTLD_NOW | RTLD_NOLOAD))) break;
    }
    return fe::cudnn_dlhandle != nullptr && fe::detail::get_backend_version() >= 90600;
  }();
  return result;
}

int64_t workspace(const Attention& shape, bool backward) {
  auto& all = plans();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return plan_of(all, current_device(), shape, backward).workspace;
}

void forward(const Attention& shape, const Tensors& tensors, void* workspace, void* stream) {
  execute(shape, tensors, false, workspace, stream);
}
void backward(const Attention& shape, const Tensors& tensors, void* workspace, void* stream) {
  execute(shape, tensors, true, workspace, stream);
}

}  // namespace mcore_bridge::cudnn
