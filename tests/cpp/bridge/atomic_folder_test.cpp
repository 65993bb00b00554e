#include "bridge/atomic_folder.h"

#include <gtest/gtest.h>

#include <fstream>
#include <sstream>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace fs = std::filesystem;
namespace {

class AtomicFolderTest : public testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::temp_directory_path() / ("mcb_atomic_" + std::to_string(::getpid()));
    fs::create_directories(root_);
  }
  void TearDown() override { fs::remove_all(root_); }
  static std::string read(const fs::path& path) {
    std::stringstream text;
    text << std::ifstream(path).rdbuf();
    return text.str();
  }
  static bool replaced(const std::string& name) { return name.ends_with(".weights"); }
  fs::path root_;
};

}  // namespace

TEST_F(AtomicFolderTest, MakesANewFolder) {
  AtomicFolder folder((root_ / "out/").string());
  folder.begin();
  write_file(folder.staging() / "a.weights", "new");
  EXPECT_FALSE(fs::exists(root_ / "out"));
  folder.commit(replaced);
  EXPECT_EQ(read(root_ / "out/a.weights"), "new");
  EXPECT_FALSE(fs::exists(folder.staging()));
}

TEST_F(AtomicFolderTest, ReplacesWeightsAndKeepsTheRest) {
  fs::create_directories(root_ / "out/sub");
  write_file(root_ / "out/a.weights", "old");
  write_file(root_ / "out/b.weights", "stale");
  write_file(root_ / "out/config.json", "{}");
  write_file(root_ / "out/sub/notes", "n");
  AtomicFolder folder((root_ / "out").string());
  folder.begin();
  write_file(folder.staging() / "a.weights", "new");
  EXPECT_EQ(read(root_ / "out/a.weights"), "old") << "nothing shows before the commit";
  folder.commit(replaced);
  EXPECT_EQ(read(root_ / "out/a.weights"), "new");
  EXPECT_EQ(read(root_ / "out/config.json"), "{}");
  EXPECT_EQ(read(root_ / "out/sub/notes"), "n");
  EXPECT_FALSE(fs::exists(root_ / "out/b.weights"));
  EXPECT_EQ(std::distance(fs::directory_iterator(root_), {}), 1);
}

TEST_F(AtomicFolderTest, CleansUpAfterAKilledRun) {
  fs::create_directories(root_ / ".out.saving");
  write_file(root_ / ".out.saving/half", "x");
  AtomicFolder folder((root_ / "out").string(), 7), earlier((root_ / "out").string(), 8);
  earlier.begin();
  write_file(earlier.staging() / "half", "x");
  fs::create_directories(root_ / ".out.savings");
  folder.begin();
  EXPECT_FALSE(fs::exists(earlier.staging()));
  write_file(folder.staging() / "a.weights", "new");
  EXPECT_THROW(write_file(earlier.staging() / "a.weights", "late"), IoError)
      << "a rank of the earlier run, still alive";
  EXPECT_EQ(read(folder.staging() / "a.weights"), "new");
  folder.abandon();
  EXPECT_TRUE(fs::exists(root_ / ".out.savings")) << "somebody else's";
  fs::remove(root_ / ".out.savings");
  EXPECT_TRUE(fs::is_empty(root_));
  // Killed between the two renames of the fallback: the old state comes back.
  fs::create_directories(root_ / ".out.old");
  write_file(root_ / ".out.old/a.weights", "old");
  folder.begin();
  EXPECT_EQ(read(root_ / "out/a.weights"), "old");
}

TEST_F(AtomicFolderTest, RefusesWhatCannotBeReplaced) {
  write_file(root_ / "file", "x");
  EXPECT_THROW(AtomicFolder((root_ / "file").string()).begin(), IoError);
  EXPECT_THROW(AtomicFolder((root_ / "file/out").string()).begin(), IoError);
  EXPECT_THROW(AtomicFolder(""), ValueError);
  EXPECT_THROW(AtomicFolder("/"), ValueError);
  EXPECT_EQ(read(root_ / "file"), "x");
}

}  // namespace mcore_bridge
