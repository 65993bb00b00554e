#include "bridge/logical_tensors.h"

#include <algorithm>
#include <map>

#include "bridge/formats/float_bytes.h"
#include "bridge/formats/quantized_source.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

/// The name of the weight that `name` belongs to, and how; empty when it stands for itself.
std::string weight_of(const CheckpointReader& reader, const std::string& name, QuantMethod& method) {
  auto without = [&](size_t ending) { return name.substr(0, name.size() - ending); };
  if (name.ends_with("_scale_inv")) {
    const auto weight = without(10);
    MCB_CHECK(reader.find(weight), "tensor '", name, "' has no weight '", weight, "'");
    method = QuantMethod::kFp8;
    return weight;
  }
  if (reader.find(fp8_scale_name(name))) {
    method = QuantMethod::kFp8;
    return name;
  }
  for (const char* ending : {"_blocks", "_scales"}) {
    if (!name.ends_with(ending)) continue;
    const auto weight = without(7);
    if (!reader.find(mxfp4_blocks_name(weight)) || !reader.find(mxfp4_scales_name(weight))) continue;
    method = QuantMethod::kMxfp4;
    return weight;
  }
  return "";
}

void set_matrix(LogicalTensor& tensor) {
  tensor.cols = tensor.shape.empty() ? 1 : tensor.shape.back();
  tensor.rows = 1;
  for (size_t i = 0; i + 1 < tensor.shape.size(); ++i) tensor.rows *= tensor.shape[i];
}

}  // namespace

uint64_t LogicalTensor::bytes() const {
  uint64_t sum = 0;
  for (const auto* part : parts) sum += part->entry->end - part->entry->begin;
  return sum;
}

void LogicalTensor::read(int64_t first, int64_t count, std::vector<float>& to) const {
  to.resize(static_cast<size_t>(count * cols));
  if (to.empty()) return;
  const Box box{first, 0, count, cols};
  if (source->dtype() == c10::ScalarType::Float) return source->read(box, to.data());
  std::vector<std::byte> raw(to.size() * c10::elementSize(source->dtype()));
  source->read(box, raw.data());
  to_float(source->dtype(), raw.data(), to.data(), count * cols);
}

std::vector<LogicalTensor> logical_tensors(const CheckpointReader& reader, const Quantization& quantization,
                                           bool quantized) {
  struct Place {
    const std::string* name;
    const CheckpointReader::Tensor* tensor;
  };
  std::vector<Place> places;
  for (const auto& [name, tensor] : reader.tensors()) places.push_back({&name, &tensor});
  std::sort(places.begin(), places.end(), [](const auto& a, const auto& b) {
    return std::pair(a.tensor->file->path(), a.tensor->entry->begin) <
           std::pair(b.tensor->file->path(), b.tensor->entry->begin);
  });

  std::vector<LogicalTensor> result;
  std::map<std::string, size_t> seen;
  for (const auto& [name, tensor] : places) {
    auto method = QuantMethod::kNone;
    const auto weight = quantized ? weight_of(reader, *name, method) : "";
    if (weight.empty()) {
      LogicalTensor plain{.name = *name, .shape = tensor->entry->shape, .parts = {tensor}, .part_names = {*name}};
      set_matrix(plain);
      if (is_float_dtype(tensor->entry->dtype)) plain.source = plain_source(*tensor, plain.cols);
      result.push_back(std::move(plain));
      continue;
    }
    if (!seen.emplace(weight, result.size()).second) continue;
    LogicalTensor joined{.name = weight, .method = method};
    joined.part_names = method == QuantMethod::kFp8 ? std::vector{weight, fp8_scale_name(weight)}
                                                    : std::vector{mxfp4_blocks_name(weight), mxfp4_scales_name(weight)};
    for (const auto& part : joined.part_names) joined.parts.push_back(reader.find(part));
    if (method == QuantMethod::kFp8) {
      joined.shape = joined.parts[0]->entry->shape;
      joined.source = fp8_source(weight, *joined.parts[0], *joined.parts[1], quantization.block);
    } else {
      joined.source = mxfp4_source(weight, *joined.parts[0], *joined.parts[1]);
      joined.shape = mxfp4_shape(*joined.parts[0]->entry);
    }
    set_matrix(joined);
    result.push_back(std::move(joined));
  }
  return result;
}

}  // namespace mcore_bridge
