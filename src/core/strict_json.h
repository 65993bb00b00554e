// JSON from files nobody vouches for, read as a stream: no tree in memory, no recursion, no repeated keys.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <unordered_set>
#include <vector>

namespace mcore_bridge {

/// Walks a JSON text and hands its values to the derived class. Every defect is a ValueError that begins with the path
/// given to parse(): text that is not JSON (also invalid UTF-8), an object that repeats a key, nesting deeper than 16.
class StrictJson : private nlohmann::json_sax<nlohmann::json> {
 public:
  ~StrictJson() override = default;
  /// `path` and `what` ("the header") begin the error texts.
  void parse(const std::string& text, const std::string& path, const std::string& what);

 protected:
  /// Levels above the value at hand: 0 for the outermost.
  size_t depth() const { return levels_.size(); }
  /// Key at a level (0: the outermost object's); empty inside a list.
  const std::string& key(size_t level) const { return levels_.at(level).key; }
  const std::string& path() const { return path_; }

  virtual void scalar(const nlohmann::json& value) = 0;
  /// An object (or list) begins or ends; depth() is that of the object itself.
  virtual void open(bool object) = 0;
  virtual void close(bool object) = 0;

 private:
  struct Level {
    bool object;
    std::string key;
    std::unordered_set<std::string> keys;
  };
  bool begin(bool object);
  bool end(bool object);
  bool give(const nlohmann::json& value);
  bool null() override { return give(nullptr); }
  bool boolean(bool value) override { return give(value); }
  bool number_integer(int64_t value) override { return give(value); }
  bool number_unsigned(uint64_t value) override { return give(value); }
  bool number_float(double value, const std::string&) override { return give(value); }
  bool string(std::string& value) override { return give(value); }
  bool binary(nlohmann::json::binary_t&) override { return false; }
  bool start_object(size_t) override { return begin(true); }
  bool start_array(size_t) override { return begin(false); }
  bool end_object() override { return end(true); }
  bool end_array() override { return end(false); }
  bool key(std::string& name) override;
  bool parse_error(size_t position, const std::string&, const nlohmann::json::exception& error) override;

  std::vector<Level> levels_;
  std::string path_, what_;
};

/// Text that any terminal and any decoder takes: bytes outside printable ASCII become '?', long texts are cut.
std::string printable(const std::string& text, size_t most = 200);

}  // namespace mcore_bridge
