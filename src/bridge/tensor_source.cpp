#include "bridge/tensor_source.h"

#include <ATen/core/Formatting.h>
#include <c10/util/ArrayRef.h>

#include <sstream>

#include "bridge/formats/quantized_source.h"

namespace mcore_bridge {
namespace {

/// A tensor that lies in a file as it is.
class PlainSource : public TensorSource {
 public:
  PlainSource(const CheckpointReader::Tensor& tensor, int64_t cols)
      : file_(*tensor.file),
        dtype_(tensor.entry->dtype),
        element_(c10::elementSize(dtype_)),
        start_(file_.offset(*tensor.entry)),
        cols_(static_cast<uint64_t>(cols)) {}

  c10::ScalarType dtype() const override { return dtype_; }
  void read(const Box& box, void* to) const override {
    file_.input().read_strided(offset(box), cols_ * element_, static_cast<uint64_t>(box.rows),
                               static_cast<uint64_t>(box.cols) * element_, to);
  }
  uint64_t file_bytes(const Box& box) const override { return static_cast<uint64_t>(box.numel()) * element_; }
  Position position(const Box& box) const override { return {file_.path(), offset(box)}; }

 private:
  uint64_t offset(const Box& box) const {
    return start_ + (static_cast<uint64_t>(box.row) * cols_ + static_cast<uint64_t>(box.col)) * element_;
  }
  const SafetensorsFile& file_;
  const c10::ScalarType dtype_;
  const uint64_t element_, start_, cols_;
};

OpenedTensor open_plain(const CheckpointReader& reader, const HfTensor& tensor, const Quantization&) {
  const auto* found = reader.find(tensor.name);
  if (!found) return {};
  OpenedTensor result{.used = {tensor.name}};
  const auto& entry = *found->entry;
  std::ostringstream wrong;
  if (entry.shape != tensor.sizes()) {
    wrong << "is " << c10::IntArrayRef(entry.shape) << ", the model needs " << c10::IntArrayRef(tensor.sizes());
  } else if (!c10::isFloatingType(entry.dtype) || c10::elementSize(entry.dtype) < 2) {
    wrong << "is " << entry.dtype_name << ", the model needs a 16, 32 or 64 bit floating point weight";
    if (c10::elementSize(entry.dtype) == 1) wrong << " (a quantised weight without its scales?)";
  }
  result.wrong = wrong.str();
  if (result.wrong.empty()) result.source = plain_source(*found, stored_columns(tensor));
  return result;
}

/// Each looks at the checkpoint and returns an OpenedTensor that is empty when the format is not its own. First come,
/// first served: formats that recognise companions of a weight (scales) stand before the plain one.
using Format = OpenedTensor (*)(const CheckpointReader&, const HfTensor&, const Quantization&);
constexpr Format kFormats[] = {open_fp8, open_mxfp4, open_plain};

}  // namespace

std::shared_ptr<const TensorSource> plain_source(const CheckpointReader::Tensor& tensor, int64_t cols) {
  return std::make_shared<PlainSource>(tensor, cols);
}

OpenedTensor open_tensor(const CheckpointReader& reader, const HfTensor& tensor, const Quantization& quantization) {
  for (const auto format : kFormats) {
    if (auto result = format(reader, tensor, quantization); !result.used.empty()) return result;
  }
  return {};
}

}  // namespace mcore_bridge
