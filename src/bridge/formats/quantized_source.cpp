#include "bridge/formats/quantized_source.h"

#include <ATen/ATen.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <sstream>

#include "bridge/formats/float_bytes.h"
#include "bridge/formats/fp8.h"
#include "bridge/formats/mxfp4.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::ostringstream text;
  text << c10::IntArrayRef(shape);
  return text.str();
}

int64_t leading(const std::vector<int64_t>& shape, size_t inner) {
  int64_t product = 1;
  for (size_t i = 0; i + inner < shape.size(); ++i) product *= shape[i];
  return product;
}

class Fp8Source : public TensorSource {
 public:
  Fp8Source(const CheckpointReader::Tensor& weight, const CheckpointReader::Tensor& scale, BlockSize block)
      : weight_(weight), scale_(scale), block_(block) {
    const auto& shape = weight.entry->shape;
    rows_ = shape[shape.size() - 2];
    cols_ = shape.back();
    scale_rows_ = blocks_of(rows_, block.rows);
    scale_cols_ = blocks_of(cols_, block.cols);
    scale_element_ = c10::elementSize(scale.entry->dtype);
    keeps_ = shape.size() == 2 && block == BlockSize{};
    kept_.dtype = scale.entry->dtype;
  }

  c10::ScalarType dtype() const override { return c10::ScalarType::Float; }
  const Fp8Scales* scales() const override { return keeps_ ? &kept_ : nullptr; }
  int64_t row_block() const override { return rows_ % block_.rows == 0 ? block_.rows : 1; }
  Position position(const Box& box) const override {
    return {weight_.file->path(),
            weight_.file->offset(*weight_.entry) + static_cast<uint64_t>(box.row * cols_ + box.col)};
  }

  uint64_t file_bytes(const Box& box) const override {
    uint64_t bytes = 0;
    for_each_matrix(box, [&](int64_t, const Box& part) {
      const auto grid = scales_of(part);
      bytes += static_cast<uint64_t>(part.numel()) + static_cast<uint64_t>(grid.numel()) * scale_element_;
    });
    return bytes;
  }

  void read(const Box& box, void* to) const override {
    auto* out = static_cast<float*>(to);
    std::vector<uint8_t> values;
    for_each_matrix(box, [&](int64_t matrix, const Box& part) {
      values.resize(static_cast<size_t>(part.numel()));
      read_codes(matrix, part, values.data());
      const auto scales = read_scales(matrix, part);
      dequantize_fp8(values.data(), part.row, part.col, part.rows, part.cols, scales.data(), scales_of(part).cols,
                     block_, out);
      out += part.numel();
    });
  }
  const TensorSource* codes() const override { return keeps_ ? &codes_ : nullptr; }

 private:
  class Codes : public TensorSource {
   public:
    explicit Codes(const Fp8Source& of) : of_(of) {}
    c10::ScalarType dtype() const override { return c10::ScalarType::Float8_e4m3fn; }
    uint64_t file_bytes(const Box& box) const override { return of_.file_bytes(box); }
    Position position(const Box& box) const override { return of_.position(box); }
    int64_t row_block() const override { return of_.row_block(); }
    void read(const Box& box, void* to) const override {
      of_.read_codes(0, box, static_cast<uint8_t*>(to));
      of_.read_scales(0, box);
    }

   private:
    const Fp8Source& of_;
  };

  void read_codes(int64_t matrix, const Box& part, uint8_t* to) const {
    weight_.file->input().read_strided(
        weight_.file->offset(*weight_.entry) + static_cast<uint64_t>((matrix * rows_ + part.row) * cols_ + part.col),
        static_cast<uint64_t>(cols_), static_cast<uint64_t>(part.rows), static_cast<uint64_t>(part.cols), to);
  }
  /// Those of scales_of(part), kept too.
  std::vector<float> read_scales(int64_t matrix, const Box& part) const {
    const auto grid = scales_of(part);
    std::vector<uint8_t> raw(static_cast<size_t>(grid.numel()) * scale_element_);
    scale_.file->input().read_strided(
        scale_.file->offset(*scale_.entry) +
            static_cast<uint64_t>((matrix * scale_rows_ + grid.row) * scale_cols_ + grid.col) * scale_element_,
        static_cast<uint64_t>(scale_cols_) * scale_element_, static_cast<uint64_t>(grid.rows),
        static_cast<uint64_t>(grid.cols) * scale_element_, raw.data());
    std::vector<float> scales(static_cast<size_t>(grid.numel()));
    to_float(scale_.entry->dtype, raw.data(), scales.data(), grid.numel());
    keep(grid, scales);
    return scales;
  }
  /// Calls work(matrix, box within it) for the matrices of a stack that the box's rows run through.
  template <class Work>
  void for_each_matrix(const Box& box, Work&& work) const {
    for (int64_t row = box.row; row < box.row + box.rows;) {
      const auto matrix = row / rows_, end = std::min(box.row + box.rows, (matrix + 1) * rows_);
      work(matrix, Box{row - matrix * rows_, box.col, end - row, box.cols});
      row = end;
    }
  }
  /// Threads whose boxes share a block write the same.
  void keep(const Box& grid, const std::vector<float>& scales) const {
    if (!keeps_) return;
    std::call_once(allocated_, [&] { kept_.grid = at::zeros({scale_rows_, scale_cols_}, at::kFloat); });
    auto* rows = kept_.grid.mutable_data_ptr<float>();
    for (int64_t i = 0; i < grid.numel(); ++i) {
      auto& place = rows[(grid.row + i / grid.cols) * scale_cols_ + grid.col + i % grid.cols];
      std::atomic_ref(place).store(scales[static_cast<size_t>(i)], std::memory_order_relaxed);
    }
  }
  /// The box of scales that a box of one matrix needs.
  Box scales_of(const Box& part) const {
    const auto row = part.row / block_.rows, col = part.col / block_.cols;
    return {row, col, (part.row + part.rows - 1) / block_.rows - row + 1,
            (part.col + part.cols - 1) / block_.cols - col + 1};
  }

  const CheckpointReader::Tensor weight_, scale_;
  const BlockSize block_;
  int64_t rows_, cols_, scale_rows_, scale_cols_;
  uint64_t scale_element_;
  bool keeps_ = false;
  mutable std::once_flag allocated_;
  mutable Fp8Scales kept_;
  const Codes codes_{*this};
};

class Mxfp4Source : public TensorSource {
 public:
  Mxfp4Source(const CheckpointReader::Tensor& blocks, const CheckpointReader::Tensor& scales)
      : blocks_(blocks),
        scales_(scales),
        rows_(blocks.entry->shape[1]),
        groups_(blocks.entry->shape[2]),
        inputs_(groups_ * kMxGroup) {}

  c10::ScalarType dtype() const override { return c10::ScalarType::BFloat16; }
  /// Whole experts: the bytes of one input lie as far apart as the outputs.
  int64_t row_block() const override { return inputs_; }
  Position position(const Box& box) const override {
    return {blocks_.file->path(), blocks_.file->offset(*blocks_.entry) +
                                      static_cast<uint64_t>((box.row / inputs_ * rows_ + box.col) * groups_) *
                                          static_cast<uint64_t>(kMxGroupBytes)};
  }

  uint64_t file_bytes(const Box& box) const override {
    uint64_t bytes = 0;
    for_each_expert(box, [&](int64_t, int64_t first, int64_t count) {
      const auto groups = (first + count - 1) / kMxGroup - first / kMxGroup + 1;
      bytes += static_cast<uint64_t>(groups * box.cols * (kMxGroupBytes + 1));
    });
    return bytes;
  }

  void read(const Box& box, void* to) const override {
    auto* out = static_cast<c10::BFloat16*>(to);
    std::vector<uint8_t> bytes, scales;
    for_each_expert(box, [&](int64_t expert, int64_t first, int64_t count) {
      const auto group = first / kMxGroup, groups = (first + count - 1) / kMxGroup - group + 1;
      auto read = [&](const CheckpointReader::Tensor& tensor, int64_t width, std::vector<uint8_t>& into) {
        into.resize(static_cast<size_t>(box.cols * groups * width));
        tensor.file->input().read_strided(
            tensor.file->offset(*tensor.entry) +
                static_cast<uint64_t>(((expert * rows_ + box.col) * groups_ + group) * width),
            static_cast<uint64_t>(groups_ * width), static_cast<uint64_t>(box.cols),
            static_cast<uint64_t>(groups * width), into.data());
      };
      read(blocks_, kMxGroupBytes, bytes);
      read(scales_, 1, scales);
      // Tiles of outputs, so that what a group scatters over 32 rows stays in the cache.
      constexpr int64_t kTile = 64;
      float values[kMxGroup];
      for (int64_t left = 0; left < box.cols; left += kTile) {
        for (int64_t g = 0; g < groups; ++g) {
          const auto input = (group + g) * kMxGroup;
          const auto begin = std::max(first, input) - input, end = std::min(first + count, input + kMxGroup) - input;
          for (int64_t col = left; col < std::min(box.cols, left + kTile); ++col) {
            const auto index = col * groups + g;
            decode_mxfp4(bytes.data() + index * kMxGroupBytes, scales[static_cast<size_t>(index)], values);
            for (auto i = begin; i < end; ++i) out[(input + i - first) * box.cols + col] = values[i];
          }
        }
      }
      out += count * box.cols;
    });
  }

 private:
  /// Calls work(expert, first input, count) for the experts the box's rows run through.
  template <class Work>
  void for_each_expert(const Box& box, Work&& work) const {
    for (int64_t row = box.row; row < box.row + box.rows;) {
      const auto expert = row / inputs_, end = std::min(box.row + box.rows, (expert + 1) * inputs_);
      work(expert, row - expert * inputs_, end - row);
      row = end;
    }
  }
  const CheckpointReader::Tensor blocks_, scales_;
  const int64_t rows_, groups_, inputs_;
};

/// A scale tensor that holds one number for a whole matrix.
bool is_single(const SafetensorsEntry& scale) { return leading(scale.shape, 0) == 1; }

}  // namespace

std::shared_ptr<const TensorSource> fp8_source(const std::string& name, const CheckpointReader::Tensor& weight,
                                               const CheckpointReader::Tensor& scale, BlockSize block) {
  const auto& shape = weight.entry->shape;
  const auto& grid = scale.entry->shape;
  const auto scale_name = fp8_scale_name(name);
  MCB_CHECK(weight.entry->dtype == c10::ScalarType::Float8_e4m3fn, name, " is ", weight.entry->dtype_name,
            " and has a ", scale_name, "; only F8_E4M3 is read with scales");
  MCB_CHECK(shape.size() >= 2, name, " is ", shape_text(shape), "; blockwise scales need a matrix");
  MCB_CHECK(is_float_dtype(scale.entry->dtype), scale_name, " is ", scale.entry->dtype_name,
            ", not floating point numbers");
  if (is_single(*scale.entry) && leading(shape, 2) == 1) {
    constexpr int64_t kAll = INT64_C(1) << 40;
    return std::make_shared<Fp8Source>(weight, scale, BlockSize{kAll, kAll});
  }
  auto expected = shape;
  expected[shape.size() - 2] = blocks_of(shape[shape.size() - 2], block.rows);
  expected.back() = blocks_of(shape.back(), block.cols);
  MCB_CHECK(grid == expected, scale_name, " is ", shape_text(grid), "; ", name, " of ", shape_text(shape),
            " in blocks of ", block.rows, " x ", block.cols, " (weight_block_size of config.json) needs ",
            shape_text(expected));
  return std::make_shared<Fp8Source>(weight, scale, block);
}

std::vector<int64_t> mxfp4_shape(const SafetensorsEntry& blocks) {
  return {blocks.shape[0], blocks.shape[2] * kMxGroup, blocks.shape[1]};
}

std::shared_ptr<const TensorSource> mxfp4_source(const std::string& name, const CheckpointReader::Tensor& blocks,
                                                 const CheckpointReader::Tensor& scales) {
  const auto& shape = blocks.entry->shape;
  MCB_CHECK(blocks.entry->dtype == c10::ScalarType::Byte && scales.entry->dtype == c10::ScalarType::Byte, name,
            ": MXFP4 blocks and scales are U8, found ", blocks.entry->dtype_name, " and ", scales.entry->dtype_name);
  MCB_CHECK(shape.size() == 4 && shape[3] == kMxGroupBytes, mxfp4_blocks_name(name), " is ", shape_text(shape),
            ", not [experts, rows, groups, 16]");
  MCB_CHECK(scales.entry->shape == std::vector<int64_t>(shape.begin(), shape.end() - 1), mxfp4_scales_name(name),
            " is ", shape_text(scales.entry->shape), ", the blocks are ", shape_text(shape));
  return std::make_shared<Mxfp4Source>(blocks, scales);
}

OpenedTensor open_fp8(const CheckpointReader& reader, const HfTensor& tensor, const Quantization& quantization) {
  const auto* weight = reader.find(tensor.name);
  const auto* scale = reader.find(fp8_scale_name(tensor.name));
  if (!weight || !scale) return {};
  OpenedTensor result{.used = {tensor.name, fp8_scale_name(tensor.name)}};
  if (weight->entry->shape != tensor.sizes()) {
    result.wrong = "is " + shape_text(weight->entry->shape) + ", the model needs " + shape_text(tensor.sizes());
  } else {
    result.source = fp8_source(tensor.name, *weight, *scale, quantization.block);
  }
  return result;
}

OpenedTensor open_mxfp4(const CheckpointReader& reader, const HfTensor& tensor, const Quantization&) {
  const auto* blocks = reader.find(mxfp4_blocks_name(tensor.name));
  const auto* scales = reader.find(mxfp4_scales_name(tensor.name));
  if (!blocks || !scales) return {};
  OpenedTensor result{.used = {mxfp4_blocks_name(tensor.name), mxfp4_scales_name(tensor.name)}};
  auto source = mxfp4_source(tensor.name, *blocks, *scales);
  if (mxfp4_shape(*blocks->entry) != tensor.sizes()) {
    result.wrong =
        "is " + shape_text(mxfp4_shape(*blocks->entry)) + " in MXFP4, the model needs " + shape_text(tensor.sizes());
  } else {
    result.source = std::move(source);
  }
  return result;
}

}  // namespace mcore_bridge
