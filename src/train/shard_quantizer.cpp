#include "train/shard_quantizer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "mcore_bridge/error.h"
#include "train/sharded_optimizer.h"

namespace mcore_bridge {
namespace {

constexpr const char* kWayOut = ", or leave out fp8_param (--fp8_param_gather) and keep fp8";

}  // namespace

void check_fp8_param(const std::vector<ManagedParameter>& parameters, const OptimizerOptions& options) {
  const auto sharding = buffer_options(options).sharding;
  for (const auto& parameter : parameters) {
    if (!parameter.in_fp8) continue;
    MCB_CHECK(sharding != Sharding::kParameters,
              "fp8_param: weights kept in FP8 are not sharded fully by this version; choose "
              "data_parallel_sharding_strategy optim or no_shard",
              kWayOut);
    if (!parameter.trainable) continue;
    MCB_CHECK(sharding != Sharding::kGradients, "fp8_param: ", parameter.name,
              " trains and is kept as FP8 codes, which get their gradient in place and not by "
              "data_parallel_sharding_strategy "
              "optim_grads in this version; choose optim or no_shard",
              kWayOut);
    MCB_CHECK(options.main_params_dtype == "fp32", "fp8_param: ", parameter.name,
              " trains and is kept as FP8 codes, which need a master that is more precise than main_params_dtype ",
              options.main_params_dtype, "; choose main_params_dtype fp32", kWayOut);
  }
}

ShardQuantizer::ShardQuantizer(const std::vector<ManagedParameter>& parameters,
                               const std::vector<std::unique_ptr<Segment>>& segments, const ParallelState& parallel,
                               bool shared) {
  if (shared) replicas_ = parallel.replicas(/*expert=*/false);
  agree_ = {replicas_};
  int64_t count = 0;
  std::map<const ManagedParameter*, int64_t> places;
  std::map<std::shared_ptr<AmaxHistory>, std::pair<std::vector<int64_t>, std::vector<int64_t>>> histories;
  at::TensorOptions options;
  for (const auto& parameter : parameters) {
    if (!parameter.trainable || !parameter.in_fp8) continue;
    const auto& fp8 = *parameter.in_fp8->fp8();
    const auto& scale = fp8.stored_scale();
    TORCH_INTERNAL_ASSERT(scale.is_contiguous() && !parameter.traits.expert);
    weights_[parameter.tensor.unsafeGetTensorImpl()] = {parameter.in_fp8};
    places[&parameter] = count;
    scales_.push_back({scale, count});
    if (const auto& history = fp8.options().history) {
      histories[history].first.push_back(fp8.weight_slot());
      histories[history].second.push_back(count);
    }
    count += scale.numel();
    dtype_ = parameter.in_fp8->dtype();
    options = scale.options();
  }
  TORCH_INTERNAL_ASSERT(!scales_.empty());
  // Blocks do not cross tensor ranks, whole tensors do.
  if (scales_[0].scale.dim() == 1) agree_.push_back(parallel.tp);
  amax_ = at::zeros({count}, options);
  for (const auto& [history, numbers] : histories) {
    auto on_device = [&](const std::vector<int64_t>& values) {
      return at::tensor(values, at::kLong).to(amax_.device());
    };
    histories_.push_back({history, on_device(numbers.first), on_device(numbers.second)});
  }
  for (const auto& segment : segments) {
    if (!segment->is_codes()) continue;
    for (const auto& piece : segment->pieces) {
      const auto& codes = piece.parameter->tensor;
      const auto& scale = piece.parameter->in_fp8->fp8()->stored_scale();
      const auto length = piece.end - piece.begin;
      const Fp8Part part{.values = segment->master.narrow(0, piece.offset, length),
                         .codes = segment->parameter.narrow(0, piece.offset, length),
                         .begin = piece.begin,
                         .columns = codes.size(1),
                         .first = places.at(piece.parameter),
                         .stride = scale.dim() == 1 ? 0 : scale.size(1)};
      (segment->on_host ? on_host_ : on_device_).push_back(part);
      weights_.at(codes.unsafeGetTensorImpl()).parts.push_back(part);
    }
  }
}

template <class F>
void ShardQuantizer::for_parts(F f) const {
  if (!on_device_.empty()) f(on_device_);
  for (auto part : on_host_) {
    part.values = part.values.to(amax_.device());
    f({part});
  }
}

void ShardQuantizer::run() {
  const at::NoGradGuard no_grad;
  amax_.zero_();
  for_parts([&](const std::vector<Fp8Part>& parts) { fp8_raise_amax(parts, amax_, dtype_); });
  for (const auto& group : agree_) group.all_reduce_max(amax_);
  fp8_write_scales(scales_, amax_);
  for_parts([&](const std::vector<Fp8Part>& parts) { fp8_quantize(parts, amax_, dtype_); });
  for (const auto& [history, slots, magnitudes] : histories_) history->raise(slots, amax_.index_select(0, magnitudes));
  for (auto& [codes, weight] : weights_) weight.layer->wide().forget();
}

at::Tensor ShardQuantizer::values(const at::Tensor& codes) const {
  const at::NoGradGuard no_grad;
  auto whole = at::zeros(codes.sizes(), codes.options().dtype(dtype_).requires_grad(false));
  const auto flat = whole.view({-1});
  for (const auto& part : weights_.at(codes.unsafeGetTensorImpl()).parts)
    flat.narrow(0, part.begin, part.values.numel()).copy_(part.values);
  auto bytes = flat.view(at::kByte);  // each is not zero on one rank at most
  replicas_.all_reduce(bytes);
  return whole;
}

}  // namespace mcore_bridge
