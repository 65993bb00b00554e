#include "bridge/shard_layout.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "bridge/safetensors_file.h"
#include "bridge/shard_writer.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace fs = std::filesystem;

TEST(ShardLayoutTest, DtypesMixAndStayAligned) {
  using enum c10::ScalarType;
  const std::vector<StoredTensor> tensors = {
      {"odd", {3}, Float8_e4m3fn}, {"scale", {1}, Float}, {"w", {3, 5}, BFloat16}};
  const auto layout = shard_layout(tensors, 1'000'000, "model");
  ASSERT_EQ(layout.files.size(), 1u);
  EXPECT_TRUE(layout.index.empty());
  for (const auto& tensor : tensors)
    EXPECT_EQ(layout.places.at(tensor.name).offset % c10::elementSize(tensor.dtype), 0u) << tensor.name;
  const auto folder = fs::temp_directory_path() / ("mcb_layout_" + std::to_string(::getpid()));
  fs::create_directories(folder);
  ShardWriter writer(folder, layout);
  writer.create();
  writer.write_box("odd", 3, {0, 1, 1, 2}, "yz", 1);
  writer.write_box("odd", 3, {0, 0, 1, 1}, "x", 1);
  writer.write_box("w", 5, {1, 2, 2, 2}, "AaBbCcDd", 2);
  writer.sync();
  {
    const SafetensorsFile file((folder / "model.safetensors").string());
    EXPECT_EQ(file.entries().at("odd").dtype_name, "F8_E4M3");
    EXPECT_EQ(file.entries().at("w").shape, (std::vector<int64_t>{3, 5}));
    std::string text(30, ' ');
    file.input().read(file.offset(file.entries().at("odd")), text.data(), 3);
    EXPECT_EQ(text.substr(0, 3), "xyz");
    file.input().read(file.offset(file.entries().at("w")), text.data(), 30);
    EXPECT_EQ(text.substr(14, 4), "AaBb");
    EXPECT_EQ(text.substr(24, 4), "CcDd");
  }
  EXPECT_THROW(writer.write_box("odd", 3, {0, 2, 1, 2}, "yz", 1), std::logic_error);
  fs::remove_all(folder);
}

TEST(ShardLayoutTest, FilesCloseBeforeTheyWouldExceedTheLimit) {
  std::vector<StoredTensor> tensors;
  for (int i = 0; i < 5; ++i) tensors.push_back({"t" + std::to_string(i), {10}, c10::ScalarType::Float});
  tensors.push_back({"large", {1000}, c10::ScalarType::Float});
  const auto layout = shard_layout(tensors, 80, "model");
  ASSERT_EQ(layout.files.size(), 4u) << "2 + 2 + 1 tensors and one that is larger than a file should be";
  EXPECT_EQ(layout.files[3].name, "model-00004-of-00004.safetensors");
  EXPECT_EQ(layout.places.at("t3").file, 1);
  EXPECT_NE(layout.index.find("\"total_size\": 4200"), std::string::npos) << layout.index;
  EXPECT_EQ(shard_layout(tensors, 80, "adapter_model").files.size(), 1u);
  tensors.push_back(tensors.back());
  EXPECT_THROW(shard_layout(tensors, 80, "model"), ValueError) << "one name twice";
  EXPECT_THROW(shard_layout({}, 80, "model"), ValueError);
  EXPECT_THROW(shard_layout(tensors, 0, "model"), ValueError);
}

TEST(ShardWriterTest, AFullDiskShowsBeforeAnyData) {
  const auto folder = fs::temp_directory_path() / ("mcb_full_" + std::to_string(::getpid()));
  fs::create_directories(folder);
  const auto layout = shard_layout({{"a", {int64_t{1} << 55}, c10::ScalarType::Float}}, int64_t{1} << 60, "model");
  ShardWriter writer(folder, layout);
  EXPECT_THROW(writer.create(), IoError);
  fs::remove_all(folder);
}

}  // namespace mcore_bridge
