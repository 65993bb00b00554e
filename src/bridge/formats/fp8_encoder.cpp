#include "bridge/formats/fp8_encoder.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "bridge/formats/float_bytes.h"
#include "bridge/formats/fp8.h"
#include "bridge/formats/fp8_blocks.h"
#include "bridge/formats/quantization.h"
#include "bridge/region_blocks.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

constexpr BlockSize kBlock;

class Fp8Encoder : public TensorEncoder {
 public:
  Fp8Encoder(c10::ScalarType dtype, const std::vector<HfTensor>& tensors, const Fp8ScalesByName& known)
      : plain_(plain_encoder(dtype)), known_(known) {
    int64_t count = 0;
    for (const auto& tensor : tensors) {
      if (!is_fp8_weight(tensor)) continue;
      auto& grid = grids_[tensor.name];
      grid = {
          .first = count, .rows = blocks_of(tensor.rows, kBlock.rows), .columns = blocks_of(tensor.cols, kBlock.cols)};
      if (const auto found = known.find(tensor.name); found != known.end())
        grid.dtype = fp8_scale_dtype(found->second.dtype);
      count += grid.rows * grid.columns;
    }
    MCB_CHECK(count > 0, "save_weights: quantization fp8: the checkpoint has no linear weight to quantise");
    scales_ = at::zeros({count}, at::kFloat);
    factors_ = at::zeros({count}, at::kFloat);
  }

  std::vector<StoredTensor> stored(const HfTensor& tensor) const override {
    if (!is_fp8_weight(tensor)) return plain_->stored(tensor);
    const auto& grid = grids_.at(tensor.name);
    return {{tensor.name, tensor.sizes(), c10::ScalarType::Float8_e4m3fn},
            {fp8_scale_name(tensor.name), {grid.rows, grid.columns}, grid.dtype}};
  }

  void prepare(const std::vector<PlannedParameter>& parameters, const Group& model) override {
    const at::NoGradGuard no_grad;
    const auto all = at::zeros({3, scales_.numel()}, at::kFloat);
    const Agreement agreement{all[0], all[1], all[2]};
    for (const auto& parameter : parameters) {
      at::Tensor value;
      for (const auto& region : parameter.plan.regions) {
        const auto& tensor = parameter.plan.tensors[region.tensor];
        if (!region.owner || region.rows * region.cols == 0 || !grids_.contains(tensor.name)) continue;
        if (!value.defined()) value = parameter.value();
        examine(tensor, region_block(tensor, region, value), agreement);
      }
    }
    auto sent = all;
    model.all_reduce_max(sent);
    for (const auto& [name, grid] : grids_) decide(grid, agreement);
  }

  int64_t row_block(const HfTensor& tensor) const override {
    return is_fp8_weight(tensor) ? kBlock.rows : plain_->row_block(tensor);
  }

  void write(const HfTensor& tensor, const Box& part, const at::Tensor& values, ShardWriter& writer) const override {
    if (!is_fp8_weight(tensor)) return plain_->write(tensor, part, values, writer);
    const auto& grid = grids_.at(tensor.name);
    const auto numbers = values.to(at::kFloat);
    std::vector<uint8_t> quantised(static_cast<size_t>(part.numel()));
    quantize_fp8(numbers.const_data_ptr<float>(), part.row, part.col, part.rows, part.cols,
                 block_of(factors_, grid, part), grid.columns, kBlock, quantised.data());
    writer.write_box(tensor.name, tensor.cols, part, quantised.data(), 1);
    // Parts that share a block write the same scale.
    const auto row = part.row / kBlock.rows, col = part.col / kBlock.cols;
    const Box box{row, col, blocks_of(part.row + part.rows, kBlock.rows) - row,
                  blocks_of(part.col + part.cols, kBlock.cols) - col};
    const auto* first = block_of(scales_, grid, part);
    std::vector<float> scales;
    for (int64_t i = 0; i < box.rows; ++i)
      scales.insert(scales.end(), first + i * grid.columns, first + i * grid.columns + box.cols);
    for (const auto scale : scales) {
      if (!std::isfinite(scale))
        fail<NonFiniteError>("save_weights: '", tensor.name, "' holds NaN or Inf and cannot be quantised as fp8");
    }
    const auto element = c10::elementSize(grid.dtype);
    std::vector<std::byte> bytes(scales.size() * element);
    from_float(grid.dtype, scales.data(), bytes.data(), box.numel());
    writer.write_box(fp8_scale_name(tensor.name), grid.columns, box, bytes.data(), element);
  }

 private:
  /// Where a tensor's blocks stand among those of all.
  struct Grid {
    int64_t first = 0, rows = 0, columns = 0;
    c10::ScalarType dtype = c10::ScalarType::Float;  // of the scales in the file
  };
  /// What the ranks have to agree on, a number per block: the largest of each counts.
  struct Agreement {
    at::Tensor amax;     // largest magnitude; infinite where a value is not finite
    at::Tensor known;    // the scale it was loaded with; 0 for none
    at::Tensor changed;  // not 0 where a value is not what that scale makes of it
  };

  /// The number of the block that holds a box's first element.
  static float* block_of(const at::Tensor& numbers, const Grid& grid, const Box& box) {
    return numbers.mutable_data_ptr<float>() + grid.first + box.row / kBlock.rows * grid.columns +
           box.col / kBlock.cols;
  }

  void examine(const HfTensor& tensor, const RegionBlock& region, const Agreement& agreement) const {
    const auto& grid = grids_.at(tensor.name);
    const auto& box = region.box;
    const auto values = region.view.to(at::kCPU, at::kFloat).contiguous();
    auto raise = [&](const at::Tensor& numbers, const at::Tensor& by) {
      return raise_amax(by.const_data_ptr<float>(), box.row, box.col, box.rows, box.cols, block_of(numbers, grid, box),
                        grid.columns, kBlock);
    };
    // Every rank must see it, and say so where all of them can: in write().
    if (!raise(agreement.amax, values)) *block_of(agreement.amax, grid, box) = std::numeric_limits<float>::infinity();
    const auto found = known_.find(tensor.name);
    if (found == known_.end() || !found->second.grid.defined()) return;
    const auto known = found->second.grid.view(-1);
    agreement.known.narrow(0, grid.first, known.numel()).copy_(known);
    const auto factors = known.reciprocal().nan_to_num_(0, 0, 0);
    const Grid alone{.first = 0, .rows = grid.rows, .columns = grid.columns};
    std::vector<uint8_t> bytes(static_cast<size_t>(box.numel()));
    quantize_fp8(values.const_data_ptr<float>(), box.row, box.col, box.rows, box.cols, block_of(factors, alone, box),
                 grid.columns, kBlock, bytes.data());
    auto again = at::empty_like(values);
    dequantize_fp8(bytes.data(), box.row, box.col, box.rows, box.cols, block_of(known, alone, box), grid.columns,
                   kBlock, again.mutable_data_ptr<float>());
    again = again.to(region.view.scalar_type()).to(at::kFloat);
    raise(agreement.changed, again.ne(values).to(at::kFloat));
  }

  /// Scales of a tensor's blocks: the known one where the block is unchanged, a new one elsewhere.
  void decide(const Grid& grid, const Agreement& agreement) {
    auto of_grid = [&](const at::Tensor& numbers) { return numbers.narrow(0, grid.first, grid.rows * grid.columns); };
    const auto [scale, factor] =
        fp8_blocks(of_grid(agreement.amax), of_grid(agreement.known), of_grid(agreement.changed), grid.dtype);
    of_grid(scales_).copy_(scale);
    of_grid(factors_).copy_(factor);
  }

  std::unique_ptr<TensorEncoder> plain_;
  const Fp8ScalesByName& known_;
  std::map<std::string, Grid> grids_;
  at::Tensor scales_, factors_;  // of every block of every quantised tensor
};

}  // namespace

std::unique_ptr<TensorEncoder> fp8_encoder(c10::ScalarType dtype, const std::vector<HfTensor>& tensors,
                                           const Fp8ScalesByName& known) {
  return std::make_unique<Fp8Encoder>(dtype, tensors, known);
}

std::string fp8_config_text(const std::string& config, const std::vector<HfTensor>& tensors) {
  auto content = nlohmann::ordered_json::parse(config, nullptr, false);
  MCB_CHECK(content.is_object(), "save_weights: config.json is no JSON object");
  std::vector<std::string> left;
  for (const auto& tensor : tensors) {
    if (is_fp8_weight(tensor) || tensor.vector) continue;
    left.push_back(tensor.name.ends_with(".weight") ? tensor.name.substr(0, tensor.name.size() - 7) : tensor.name);
  }
  content["quantization_config"] =
      nlohmann::ordered_json::parse(quantization_config(QuantMethod::kFp8, kBlock, left).dump());
  return content.dump(2) + "\n";
}

}  // namespace mcore_bridge
