#include "bindings/forward_input.h"

#include <algorithm>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

PackedSeqParams packed_seq_params(const py::handle& value, c10::Device device) {
  auto attribute = [&](const char* name) {
    return py::hasattr(value, name) ? py::object(value.attr(name)) : py::object(py::none());
  };
  auto ends = attribute("cu_seqlens");
  if (ends.is_none()) ends = attribute("cu_seqlens_q");
  MCB_CHECK(!ends.is_none(), "packed_seq_params: cu_seqlens is missing");
  const auto tensor = ends.cast<at::Tensor>();
  MCB_CHECK(tensor.dim() == 1 && tensor.numel() >= 2, "packed_seq_params: cu_seqlens must be [documents + 1], found ",
            tensor.sizes());
  PackedSeqParams result;
  const auto host = tensor.to(at::kCPU).to(at::kLong).contiguous();
  result.cu_seqlens_host.assign(host.const_data_ptr<int64_t>(), host.const_data_ptr<int64_t>() + host.numel());
  MCB_CHECK(result.cu_seqlens_host.front() == 0, "packed_seq_params: cu_seqlens must start at 0, found ",
            result.cu_seqlens_host.front());
  for (size_t i = 0; i + 1 < result.cu_seqlens_host.size(); ++i) {
    const auto length = result.cu_seqlens_host[i + 1] - result.cu_seqlens_host[i];
    MCB_CHECK(length >= 0, "packed_seq_params: cu_seqlens decreases at index ", i + 1);
    result.max_seqlen = std::max(result.max_seqlen, length);
  }
  result.cu_seqlens = tensor.to(device, at::kInt);
  return result;
}

}  // namespace

ForwardInput forward_input(const py::dict& values, c10::Device device) {
  ForwardInput result;
  for (const auto& [key, value] : values) {
    const auto name = key.cast<std::string>();
    at::Tensor* slot = name == "input_ids"        ? &result.input_ids
                       : name == "position_ids"   ? &result.position_ids
                       : name == "attention_mask" ? &result.attention_mask
                       : name == "labels"         ? &result.labels
                       : name == "hidden"         ? &result.hidden
                                                  : nullptr;
    if (!slot && name != "packed_seq_params")
      fail<KeyError>("micro-batch: unknown key '", name,
                     "'; known: input_ids, position_ids, attention_mask, labels, packed_seq_params");
    if (value.is_none()) continue;
    if (slot) {
      *slot = value.cast<at::Tensor>().to(device, /*non_blocking=*/true);
    } else {
      result.packed = packed_seq_params(value, device);
    }
  }
  return result;
}

}  // namespace mcore_bridge
