#include "bridge/formats/fp8_encoder.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "bridge/formats/fp8.h"
#include "bridge/formats/quantization.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

constexpr BlockSize kBlock;

bool is_quantized(const HfTensor& tensor) {
  return is_quantized_weight(QuantMethod::kFp8, tensor.name, tensor.sizes());
}

class Fp8Encoder : public TensorEncoder {
 public:
  Fp8Encoder(c10::ScalarType dtype, const std::vector<HfTensor>& tensors) : plain_(plain_encoder(dtype)) {
    int64_t count = 0;
    for (const auto& tensor : tensors) {
      if (!is_quantized(tensor)) continue;
      grids_[tensor.name] = {count, blocks_of(tensor.cols, kBlock.cols)};
      count += blocks_of(tensor.rows, kBlock.rows) * grids_[tensor.name].columns;
    }
    MCB_CHECK(count > 0, "save_weights: quantization fp8: the checkpoint has no linear weight to quantise");
    amax_ = at::zeros({count}, at::kFloat);
  }

  std::vector<StoredTensor> stored(const HfTensor& tensor) const override {
    if (!is_quantized(tensor)) return plain_->stored(tensor);
    return {{tensor.name, tensor.sizes(), c10::ScalarType::Float8_e4m3fn},
            {fp8_scale_name(tensor.name),
             {blocks_of(tensor.rows, kBlock.rows), blocks_of(tensor.cols, kBlock.cols)},
             c10::ScalarType::Float}};
  }

  void prepare(const std::vector<PlannedParameter>& parameters, const Group& model) override {
    const at::NoGradGuard no_grad;
    for (const auto& parameter : parameters) {
      at::Tensor value;
      for (const auto& region : parameter.plan.regions) {
        const auto& tensor = parameter.plan.tensors[region.tensor];
        if (!region.owner || region.rows * region.cols == 0 || !grids_.contains(tensor.name)) continue;
        if (!value.defined()) value = parameter.value();
        const auto values = value.narrow(0, region.row, region.rows)
                                .narrow(1, region.col, region.cols)
                                .to(at::kCPU, at::kFloat)
                                .contiguous();
        if (!raise_amax(values.const_data_ptr<float>(), region.hf_row, region.hf_col, region.rows, region.cols,
                        first_block(tensor, region.hf_row, region.hf_col), grids_.at(tensor.name).columns, kBlock)) {
          // Every rank must see it, and say so where all of them can: in write().
          *first_block(tensor, region.hf_row, region.hf_col) = std::numeric_limits<float>::infinity();
        }
      }
    }
    model.all_reduce_max(amax_);
  }

  int64_t row_block(const HfTensor& tensor) const override {
    return is_quantized(tensor) ? kBlock.rows : plain_->row_block(tensor);
  }

  void write(const HfTensor& tensor, const Box& part, const at::Tensor& values, ShardWriter& writer) const override {
    if (!is_quantized(tensor)) return plain_->write(tensor, part, values, writer);
    const auto columns = grids_.at(tensor.name).columns;
    const auto* amax = first_block(tensor, part.row, part.col);
    const auto numbers = values.to(at::kFloat);
    std::vector<uint8_t> quantised(static_cast<size_t>(part.numel()));
    quantize_fp8(numbers.const_data_ptr<float>(), part.row, part.col, part.rows, part.cols, amax, columns, kBlock,
                 quantised.data());
    writer.write_box(tensor.name, tensor.cols, part, quantised.data(), 1);
    // Whoever holds a block's first element writes its scale.
    const auto first_row = blocks_of(part.row, kBlock.rows), first_col = blocks_of(part.col, kBlock.cols);
    const auto end_row = blocks_of(part.row + part.rows, kBlock.rows),
               end_col = blocks_of(part.col + part.cols, kBlock.cols);
    const Box grid{first_row, first_col, end_row - first_row, end_col - first_col};
    std::vector<float> scales;
    for (auto row = first_row; row < end_row; ++row) {
      for (auto col = first_col; col < end_col; ++col) {
        const auto largest = *first_block(tensor, row * kBlock.rows, col * kBlock.cols);
        if (!(largest <= std::numeric_limits<float>::max()))
          fail<NonFiniteError>("save_weights: '", tensor.name, "' holds NaN or Inf and cannot be quantised as fp8");
        scales.push_back(fp8_scale(largest));
      }
    }
    if (!scales.empty()) writer.write_box(fp8_scale_name(tensor.name), columns, grid, scales.data(), sizeof(float));
  }

 private:
  struct Grid {
    int64_t first = 0, columns = 0;
  };
  /// The number of the block that holds an element.
  float* first_block(const HfTensor& tensor, int64_t row, int64_t col) const {
    const auto& grid = grids_.at(tensor.name);
    return amax_.mutable_data_ptr<float>() + grid.first + row / kBlock.rows * grid.columns + col / kBlock.cols;
  }
  std::unique_ptr<TensorEncoder> plain_;
  std::map<std::string, Grid> grids_;
  at::Tensor amax_;  // largest magnitude of every block of every quantised tensor
};

}  // namespace

std::unique_ptr<TensorEncoder> fp8_encoder(c10::ScalarType dtype, const std::vector<HfTensor>& tensors) {
  return std::make_unique<Fp8Encoder>(dtype, tensors);
}

std::string fp8_config_text(const std::string& config, const std::vector<HfTensor>& tensors) {
  auto content = nlohmann::ordered_json::parse(config, nullptr, false);
  MCB_CHECK(content.is_object(), "save_weights: config.json is no JSON object");
  std::vector<std::string> left;
  for (const auto& tensor : tensors) {
    if (is_quantized(tensor) || tensor.vector) continue;
    left.push_back(tensor.name.ends_with(".weight") ? tensor.name.substr(0, tensor.name.size() - 7) : tensor.name);
  }
  content["quantization_config"] =
      nlohmann::ordered_json::parse(quantization_config(QuantMethod::kFp8, kBlock, left).dump());
  return content.dump(2) + "\n";
}

}  // namespace mcore_bridge
