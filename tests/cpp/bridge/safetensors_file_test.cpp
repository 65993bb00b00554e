#include "bridge/safetensors_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>

#include "bridge/checkpoint_reader.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace fs = std::filesystem;
namespace {

class SafetensorsTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("mcb_safetensors_" + std::to_string(::getpid()));
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string write(const std::string& bytes, const std::string& name = "model.safetensors") {
    std::ofstream(folder_ / name, std::ios::binary) << bytes;
    return (folder_ / name).string();
  }
  static std::string with_header(const std::string& header, const std::string& data, uint64_t length) {
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &length, 8);
    return bytes + header + data;
  }
  static std::string with_header(const std::string& header, const std::string& data) {
    return with_header(header, data, header.size());
  }

  /// The text of the error that opening these bytes gives.
  std::string error_of(const std::string& bytes) {
    try {
      SafetensorsFile file(write(bytes));
    } catch (const ValueError& error) {
      return error.what();
    }
    return "no error";
  }
  fs::path folder_;
};

#define EXPECT_ERROR(bytes, part)                          \
  do {                                                     \
    const auto text = error_of(bytes);                     \
    EXPECT_NE(text.find(part), std::string::npos) << text; \
  } while (false)

const char* const kGood =
    R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[],"data_offsets":[8,9]}})";

}  // namespace

TEST_F(SafetensorsTest, ReadsAWellFormedFile) {
  const SafetensorsFile file(write(with_header(kGood, "12345678x")));
  ASSERT_EQ(file.entries().size(), 2u);
  EXPECT_EQ(file.entries().at("a").shape, (std::vector<int64_t>{2}));
  char last = 0;
  file.input().read(file.offset(file.entries().at("b")), &last, 1);
  EXPECT_EQ(last, 'x');
  EXPECT_EQ(file.data_bytes_read(), 1u);
}

TEST_F(SafetensorsTest, EveryDefectIsNamed) {
  EXPECT_ERROR("short", "too short");
  EXPECT_ERROR(with_header("{}", "", 1'000'000), "truncated");
  EXPECT_ERROR(with_header("{}", "", ~uint64_t{0}), "too long");
  EXPECT_ERROR(with_header("{nonsense", ""), "not JSON");
  EXPECT_ERROR(with_header("\xff\xfe{}", ""), "not JSON");
  EXPECT_ERROR(with_header("[]", ""), "no JSON object");
  EXPECT_ERROR(with_header(kGood, "1234567"), "truncated");
  EXPECT_ERROR(with_header(kGood, "12345678xyz"), "belong to none");
  auto one = [](const std::string& entry) { return with_header("{\"a\":" + entry + "}", "12345678"); };
  EXPECT_ERROR(one("3"), "no object");
  EXPECT_ERROR(one(R"({"shape":[2],"data_offsets":[0,8]})"), "dtype is missing");
  EXPECT_ERROR(one(R"({"dtype":"F31","shape":[2],"data_offsets":[0,8]})"), "F31");
  EXPECT_ERROR(one(R"({"dtype":"F32","shape":2,"data_offsets":[0,8]})"), "no list");
  EXPECT_ERROR(one(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})"), "no size");
  EXPECT_ERROR(one(R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})"), "no size");
  EXPECT_ERROR(one(R"({"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,8]})"), "overflows");
  EXPECT_ERROR(one(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})"), "needs 12");
  EXPECT_ERROR(one(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"), "backwards");
  EXPECT_ERROR(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8,9]})"), "no pair");
  EXPECT_ERROR(one(R"({"dtype":"F32","shape":[2],"data_offsets":["0",8]})"), "no pair");
  EXPECT_ERROR(one(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})"), "belong to no tensor");
  const char* overlapping =
      R"({"a":{"dtype":"U8","shape":[6],"data_offsets":[0,6]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})";
  EXPECT_ERROR(with_header(overlapping, "12345678"), "overlap");
  const char* twice =
      R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})";
  EXPECT_ERROR(with_header(twice, "12345678"), "twice");
  EXPECT_ERROR(with_header(R"({"__metadata__":{"x":1}})", ""), "__metadata__");
  EXPECT_ERROR(with_header(R"({"__metadata__":[]})", ""), "__metadata__");
}

TEST_F(SafetensorsTest, HandMadeFilesOfTheFuzzerAreJudgedByTheirNames) {
  int bad = 0, good = 0;
  for (const auto& file : fs::directory_iterator(MCB_FUZZ_CORPUS)) {
    const auto name = file.path().filename().string();
    const bool refuse = name.starts_with("bad_");
    auto open = [&] {
      if (file.path().extension() == ".json") {
        std::stringstream text;
        text << std::ifstream(file.path(), std::ios::binary).rdbuf();
        parse_index(text.str(), name);
      } else {
        SafetensorsFile opened(file.path().string());
      }
    };
    if (refuse) {
      EXPECT_THROW(open(), ValueError) << name;
    } else {
      EXPECT_NO_THROW(open()) << name;
    }
    ++(refuse ? bad : good);
  }
  EXPECT_GT(bad, 60);
  EXPECT_GT(good, 8);
}

TEST_F(SafetensorsTest, AFileThatShrinksOrIsReplacedIsAnError) {
  const auto path = write(with_header(kGood, "12345678x"));
  const SafetensorsFile file(path);
  char bytes[9];
  fs::resize_file(path, fs::file_size(path) - 4);
  EXPECT_THROW(file.input().read(file.offset(file.entries().at("a")), bytes, 8), IoError);
  // Among more files than are kept open, one that was replaced meanwhile is noticed when it is opened again.
  const SafetensorsFile first(write(with_header(kGood, "12345678x"), "first.safetensors"));
  std::vector<std::unique_ptr<SafetensorsFile>> others;
  for (int i = 0; i < 100; ++i)
    others.push_back(
        std::make_unique<SafetensorsFile>(write(with_header(kGood, "12345678x"), std::to_string(i) + ".safetensors")));
  first.input().read(first.offset(first.entries().at("a")), bytes, 8);
  for (const auto& other : others) other->input().read(other->offset(other->entries().at("a")), bytes, 8);
  EXPECT_LT(std::distance(fs::directory_iterator("/proc/self/fd"), {}), 90);
  fs::remove(first.path());
  write(with_header(kGood, "abcdefghx"), "first.safetensors");
  EXPECT_THROW(first.input().read(first.offset(first.entries().at("a")), bytes, 8), IoError);
}

TEST_F(SafetensorsTest, OddFilesInPlaceOfShards) {
  fs::create_symlink("loop.safetensors", folder_ / "loop.safetensors");
  EXPECT_THROW(SafetensorsFile((folder_ / "loop.safetensors").string()), IoError);
  ASSERT_EQ(::mkfifo((folder_ / "fifo.safetensors").c_str(), 0600), 0);
  EXPECT_THROW(SafetensorsFile((folder_ / "fifo.safetensors").string()), ValueError);
  write("", "model.safetensors");
  EXPECT_THROW(CheckpointReader(folder_.string(), false), ValueError);
  write(R"({"weight_map":{"a":"loop.safetensors"}})", "model.safetensors.index.json");
  EXPECT_THROW(CheckpointReader(folder_.string(), false), Error);
}

TEST_F(SafetensorsTest, PositionsBeyondTwoGiB) {
  // A sparse file of 3 GiB with a tensor at its end.
  const uint64_t gap = 3ull << 30;
  const auto header = R"({"a":{"dtype":"U8","shape":[)" + std::to_string(gap) + R"(],"data_offsets":[0,)" +
                      std::to_string(gap) + R"(]},"b":{"dtype":"U8","shape":[3],"data_offsets":[)" +
                      std::to_string(gap) + "," + std::to_string(gap + 3) + "]}}";
  const auto path = write(with_header(header, ""));
  fs::resize_file(path, 8 + header.size() + gap + 3);
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(8 + header.size() + gap));
    file << "end";
  }
  const SafetensorsFile file(path);
  std::string text(3, ' ');
  file.input().read(file.offset(file.entries().at("b")), text.data(), 3);
  EXPECT_EQ(text, "end");
}

TEST_F(SafetensorsTest, MissingFilesAndFolders) {
  EXPECT_THROW(SafetensorsFile((folder_ / "none").string()), FileNotFoundError);
  EXPECT_THROW(CheckpointReader((folder_ / "none").string(), false), FileNotFoundError);
  EXPECT_THROW(CheckpointReader(folder_.string(), false), FileNotFoundError);
  EXPECT_THROW(SafetensorsFile(folder_.string()), Error);
}

TEST_F(SafetensorsTest, IndexIsChecked) {
  auto open_with = [&](const std::string& index) {
    write(index, "model.safetensors.index.json");
    return CheckpointReader(folder_.string(), false).tensors().size();
  };
  write(with_header(kGood, "12345678x"), "s1.safetensors");
  EXPECT_EQ(open_with(R"({"weight_map":{"a":"s1.safetensors","b":"s1.safetensors"}})"), 2u);
  EXPECT_THROW(open_with(R"({"weight_map":{"a":"../s1.safetensors"}})"), ValueError);
  EXPECT_THROW(open_with(R"({"weight_map":{"a":"/etc/passwd"}})"), ValueError);
  EXPECT_THROW(open_with(R"({"weight_map":{"a":"s2.safetensors"}})"), FileNotFoundError);
  EXPECT_THROW(open_with(R"({"weight_map":{"c":"s1.safetensors"}})"), KeyError);
  EXPECT_THROW(open_with(R"({"weight_map":{"a":3}})"), ValueError);
  EXPECT_THROW(open_with("{"), ValueError);
  EXPECT_THROW(open_with("{}"), ValueError);
  write(with_header(kGood, "12345678x"), "s2.safetensors");
  EXPECT_THROW(open_with(R"({"weight_map":{"a":"s1.safetensors","b":"s2.safetensors"}})"), ValueError)
      << "in two shards";
}

}  // namespace mcore_bridge
