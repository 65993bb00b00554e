#include "bridge/tensor_encoder.h"

#include <ATen/ATen.h>

namespace mcore_bridge {
namespace {

class PlainEncoder : public TensorEncoder {
 public:
  explicit PlainEncoder(c10::ScalarType dtype) : dtype_(dtype) {}

  std::vector<StoredTensor> stored(const HfTensor& tensor) const override {
    return {{tensor.name, tensor.sizes(), plain_dtype(tensor, dtype_)}};
  }
  void write(const HfTensor& tensor, const Box& box, const at::Tensor& values, ShardWriter& writer) const override {
    const auto dtype = plain_dtype(tensor, dtype_);
    const auto converted = values.scalar_type() == dtype ? values : values.to(dtype);
    writer.write_box(tensor.name, stored_columns(tensor), box, converted.const_data_ptr(), c10::elementSize(dtype));
  }

 private:
  c10::ScalarType dtype_;
};

}  // namespace

std::unique_ptr<TensorEncoder> plain_encoder(c10::ScalarType dtype) { return std::make_unique<PlainEncoder>(dtype); }

}  // namespace mcore_bridge
