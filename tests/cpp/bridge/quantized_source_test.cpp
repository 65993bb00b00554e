// Any box of a quantised weight is that box of the whole, and reads the bytes it says.
#include "bridge/formats/quantized_source.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "bridge/formats/float_bytes.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

/// A checkpoint of U8-sized tensors and float scales with pseudo-random content, removed at the end.
class QuantizedSource : public testing::Test {
 protected:
  void write(const std::string& header, size_t bytes, size_t float_bytes = 0) {
    path_ = std::filesystem::temp_directory_path() / ("mcb_quantized_" + std::to_string(::getpid()) + ".safetensors");
    std::ofstream file(path_, std::ios::binary);
    const uint64_t length = header.size();
    file.write(reinterpret_cast<const char*>(&length), 8);
    file << header;
    uint32_t state = 7;
    for (size_t i = 0; i < bytes; ++i) {
      state = state * 1664525 + 1013904223;
      file.put(static_cast<char>(state >> 25));  // below 128: no NaN but 127
    }
    for (size_t i = 0; i < float_bytes / 4; ++i) {
      const float scale = 0.5f + static_cast<float>(i);
      file.write(reinterpret_cast<const char*>(&scale), 4);
    }
    file.close();
    reader_ = std::make_unique<CheckpointReader>(path_.string(), false);
  }
  void TearDown() override { std::filesystem::remove(path_); }

  std::vector<float> read(const TensorSource& source, const Box& box) const {
    std::vector<std::byte> raw(static_cast<size_t>(box.numel()) * c10::elementSize(source.dtype()));
    const auto before = reader_->files()[0]->data_bytes_read();
    source.read(box, raw.data());
    EXPECT_EQ(reader_->files()[0]->data_bytes_read() - before, source.file_bytes(box));
    std::vector<float> values(static_cast<size_t>(box.numel()));
    to_float(source.dtype(), raw.data(), values.data(), box.numel());
    return values;
  }

  void expect_boxes_of_the_whole(const TensorSource& source, int64_t rows, int64_t cols) const {
    const auto whole = read(source, {0, 0, rows, cols});
    uint32_t state = 3;
    auto below = [&](int64_t limit) {
      state = state * 1664525 + 1013904223;
      return static_cast<int64_t>(state >> 8) % limit;
    };
    for (int round = 0; round < 200; ++round) {
      Box box{below(rows), below(cols)};
      box.rows = 1 + below(rows - box.row);
      box.cols = 1 + below(cols - box.col);
      const auto part = read(source, box);
      for (int64_t i = 0; i < box.rows; ++i) {
        ASSERT_EQ(std::memcmp(part.data() + i * box.cols, whole.data() + (box.row + i) * cols + box.col,
                              static_cast<size_t>(box.cols) * 4),
                  0)
            << "box " << box.row << " " << box.col << " " << box.rows << " " << box.cols;
      }
    }
  }

  std::filesystem::path path_;
  std::unique_ptr<CheckpointReader> reader_;
};

}  // namespace

TEST_F(QuantizedSource, BoxesOfAStackOfRaggedFp8Matrices) {
  // [3, 70, 50] in blocks of 32 x 16: scales [3, 3, 4].
  write(R"({"w":{"dtype":"F8_E4M3","shape":[3,70,50],"data_offsets":[0,10500]},)"
        R"("w_scale_inv":{"dtype":"F32","shape":[3,3,4],"data_offsets":[10500,10644]}})",
        10500, 144);
  const auto source = fp8_source("w", *reader_->find("w"), *reader_->find("w_scale_inv"), {32, 16});
  expect_boxes_of_the_whole(*source, 210, 50);
  EXPECT_THROW(fp8_source("w", *reader_->find("w"), *reader_->find("w_scale_inv"), {32, 32}), ValueError);
}

TEST_F(QuantizedSource, BoxesOfMxfp4ExpertsAcrossGroupsAndExperts) {
  // [2 experts, 9 outputs, 3 groups, 16 bytes], the weight is [2, 96, 9].
  write(R"({"w_blocks":{"dtype":"U8","shape":[2,9,3,16],"data_offsets":[0,864]},)"
        R"("w_scales":{"dtype":"U8","shape":[2,9,3],"data_offsets":[864,918]}})",
        918);
  const auto source = mxfp4_source("w", *reader_->find("w_blocks"), *reader_->find("w_scales"));
  EXPECT_EQ(mxfp4_shape(*reader_->find("w_blocks")->entry), (std::vector<int64_t>{2, 96, 9}));
  expect_boxes_of_the_whole(*source, 192, 9);
  HfTensor tensor{.name = "w", .rows = 9, .cols = 96, .matrices = 2, .transposed = true};
  const auto opened = open_mxfp4(*reader_, tensor, {});
  EXPECT_TRUE(opened.source) << opened.wrong;
  tensor.rows = 8;
  EXPECT_FALSE(open_mxfp4(*reader_, tensor, {}).wrong.empty());
}

}  // namespace mcore_bridge
