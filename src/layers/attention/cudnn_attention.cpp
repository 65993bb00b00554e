#include "layers/attention/cudnn_attention.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <set>
#include <tuple>

#include "kernels/cudnn/attention.h"
#include "kernels/device.h"

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

int64_t power_of_two(int64_t n, int64_t least) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max(n, least))));
}

/// [s, b, heads, d] as the plan sees it.
cudnn::Attention::Strides strides(const at::Tensor& x) {
  return {.batch = x.stride(1), .token = x.stride(0), .head = x.stride(2)};
}

/// cuDNN reads 16 bytes at a time.
at::Tensor readable_heads(const at::Tensor& x) {
  const auto per = 16 / static_cast<int64_t>(x.element_size());
  const bool fits = x.stride(3) == 1 && x.stride(2) % per == 0 && x.stride(1) % per == 0 && x.stride(0) % per == 0;
  return fits && aligned(x) ? x : x.contiguous();
}

cudnn::Attention shape_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, RaggedRows* rows,
                          int64_t window_left) {
  cudnn::Attention shape{.half = q.scalar_type() == at::kHalf,
                         .batch = rows ? rows->documents() : q.size(1),
                         .heads = q.size(2),
                         .groups = k.size(2),
                         .width = q.size(3),
                         .length = rows ? rows->longest() : q.size(0),
                         .total = rows ? rows->tokens() : 0,
                         .window_left = window_left,
                         .deterministic = at::globalContext().deterministicAlgorithms(),
                         .q = strides(q),
                         .k = strides(k),
                         .v = strides(v)};
  auto made = [&](int64_t heads) {
    return cudnn::Attention::Strides{
        .batch = heads * shape.width, .token = q.size(1) * heads * shape.width, .head = shape.width};
  };
  shape.out = shape.grad_q = made(shape.heads);
  shape.grad_k = shape.grad_v = made(shape.groups);
  if (rows) {  // the only batch there is has no stride
    for (auto* s : {&shape.q, &shape.k, &shape.v, &shape.out, &shape.grad_q, &shape.grad_k, &shape.grad_v})
      s->batch = 0;
  }
  return shape;
}

/// cuDNN may have no plan for a GPU and shape: asked once.
bool plans_exist(const cudnn::Attention& shape) {
  static std::mutex mutex;
  static std::set<std::pair<int, cudnn::Attention>> refused;
  const std::pair key{static_cast<int>(c10::impl::VirtualGuardImpl(c10::kCUDA).getDevice().index()), shape};
  const std::lock_guard<std::mutex> lock(mutex);
  if (refused.contains(key)) return false;
  try {
    cudnn::workspace(shape, false);
    cudnn::workspace(shape, true);
    return true;
  } catch (const std::runtime_error&) {
    refused.insert(key);
    return false;
  }
}

struct Holder : torch::CustomClassHolder {
  std::shared_ptr<RaggedRows> rows;
  int64_t window_left = -1;
};

cudnn::Offsets offsets(RaggedRows* rows, const cudnn::Attention& shape) {
  if (!rows) return {};
  auto at = [&](int64_t stride) { return rows->offsets(stride).const_data_ptr(); };
  return {.q = at(shape.q.token),
          .k = at(shape.k.token),
          .v = at(shape.v.token),
          .out = at(shape.out.token),
          .statistics = at(shape.heads),
          .grad_k = at(shape.grad_k.token),
          .lengths = rows->lengths().const_data_ptr()};
}

at::Tensor workspace(const cudnn::Attention& shape, bool backward, const at::Tensor& like) {
  return at::empty({cudnn::workspace(shape, backward)}, like.options().dtype(at::kByte));
}

struct CudnnAttention : Function<CudnnAttention> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::shared_ptr<RaggedRows>* rows, int64_t window_left) {
    const c10::DeviceGuard guard(q.device());
    const auto shape = shape_of(q, k, v, rows->get(), window_left);
    const auto out = at::empty({q.size(0), q.size(1), q.size(2), q.size(3)}, q.options());
    const auto statistics = at::empty({q.size(0) * q.size(1) * q.size(2)}, q.options().dtype(at::kFloat));
    const auto space = workspace(shape, false, q);
    cudnn::forward(shape,
                   {.q = pointer(q),
                    .k = pointer(k),
                    .v = pointer(v),
                    .out = mutable_pointer(out),
                    .statistics = mutable_pointer(statistics),
                    .offsets = offsets(rows->get(), shape)},
                   mutable_pointer(space), current_stream(q));
    context->save_for_backward({q, k, v, out, statistics});
    auto holder = c10::make_intrusive<Holder>();
    holder->rows = *rows;
    holder->window_left = window_left;
    context->saved_data["holder"] = at::IValue::make_capsule(std::move(holder));
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &statistics = saved[4];
    const auto capsule = context->saved_data["holder"].toCapsule();
    const auto* holder = static_cast<const Holder*>(capsule.get());
    const c10::DeviceGuard guard(q.device());
    const auto shape = shape_of(q, k, v, holder->rows.get(), holder->window_left);
    const auto grad = readable(grads[0]);
    auto like = [](const at::Tensor& x) { return at::empty(x.sizes(), x.options()); };
    const variable_list result{like(q), like(k), like(v)};
    const auto space = workspace(shape, true, q);
    cudnn::backward(shape,
                    {.q = pointer(q),
                     .k = pointer(k),
                     .v = pointer(v),
                     .out = mutable_pointer(out),
                     .statistics = mutable_pointer(statistics),
                     .grad_out = pointer(grad),
                     .grad_q = mutable_pointer(result[0]),
                     .grad_k = mutable_pointer(result[1]),
                     .grad_v = mutable_pointer(result[2]),
                     .offsets = offsets(holder->rows.get(), shape)},
                    mutable_pointer(space), current_stream(q));
    return {result[0], result[1], result[2], Variable(), Variable()};
  }
};

}  // namespace

RaggedRows::RaggedRows(const PackedSeqParams& packed, int64_t tokens)
    : cu_seqlens_(packed.cu_seqlens),
      documents_(power_of_two(packed.cu_seqlens.size(0) - 1, 1)),
      longest_(power_of_two(packed.max_seqlen, 128)),
      tokens_(power_of_two(tokens, 128)) {}

const at::Tensor& RaggedRows::ends() {
  if (!ends_.defined()) {
    const auto more = documents_ + 1 - cu_seqlens_.size(0);
    ends_ = more == 0 ? cu_seqlens_
                      : at::cat({cu_seqlens_, cu_seqlens_.narrow(0, cu_seqlens_.size(0) - 1, 1).expand({more})});
  }
  return ends_;
}

const at::Tensor& RaggedRows::lengths() {
  const at::NoGradGuard no_grad;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!lengths_.defined()) lengths_ = ends().diff();
  return lengths_;
}

const at::Tensor& RaggedRows::offsets(int64_t stride) {
  const at::NoGradGuard no_grad;
  const std::lock_guard<std::mutex> lock(mutex_);
  auto& result = offsets_[stride];
  if (!result.defined()) result = ends() * stride;
  return result;
}

bool cudnn_attention_here(c10::Device device) {
  return device.is_cuda() && at::globalContext().userEnabledCuDNNSDP() && cudnn::available();
}

at::Tensor cudnn_attention(const at::Tensor& given_q, const at::Tensor& given_k, const at::Tensor& given_v,
                           const std::shared_ptr<RaggedRows>& rows, int64_t window_left) {
  const bool half = given_q.scalar_type() == at::kHalf || given_q.scalar_type() == at::kBFloat16;
  if (!half || given_q.size(-1) > 128 || given_q.size(-1) % 8 != 0 || !cudnn_attention_here(given_q.device()))
    return {};
  const auto q = readable_heads(given_q), k = readable_heads(given_k), v = readable_heads(given_v);
  const c10::DeviceGuard guard(q.device());
  if (rows) {
    const auto widest = std::max({q.stride(0), k.stride(0), v.stride(0), q.size(2) * q.size(3)});
    if (q.size(0) * widest > std::numeric_limits<int32_t>::max()) return {};
    if (window_left >= rows->longest() - 1) window_left = -1;
  }
  if (!plans_exist(shape_of(q, k, v, rows.get(), window_left))) return {};
  return CudnnAttention::apply(q, k, v, &rows, window_left).flatten(-2);
}

}  // namespace mcore_bridge
