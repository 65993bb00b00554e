#include "core/strict_json.h"

#include "mcore_bridge/error.h"

namespace mcore_bridge {

void StrictJson::parse(const std::string& text, const std::string& path, const std::string& what) {
  levels_.clear();
  path_ = path;
  what_ = what;
  nlohmann::json::sax_parse(text, static_cast<nlohmann::json_sax<nlohmann::json>*>(this));
}

bool StrictJson::begin(bool object) {
  constexpr size_t kDeepest = 16;
  MCB_CHECK(levels_.size() < kDeepest, path_, ": ", what_, " is nested deeper than ", kDeepest, " levels");
  open(object);
  levels_.push_back({object, {}, {}});
  return true;
}

bool StrictJson::end(bool object) {
  levels_.pop_back();
  close(object);
  return true;
}

bool StrictJson::give(const nlohmann::json& value) {
  scalar(value);
  return true;
}

bool StrictJson::key(std::string& name) {
  auto& level = levels_.back();
  MCB_CHECK(level.keys.insert(name).second, path_, ": ", what_, " names '", printable(name), "' twice");
  level.key = name;
  return true;
}

bool StrictJson::parse_error(size_t position, const std::string&, const nlohmann::json::exception& error) {
  fail(path_, ": ", what_, " is not JSON (byte ", position, "): ", printable(error.what()));
}

std::string printable(const std::string& text, size_t most) {
  std::string result = text.substr(0, most);
  for (auto& c : result) {
    if (c < 0x20 || c > 0x7e) c = '?';
  }
  return text.size() > most ? result + "..." : result;
}

}  // namespace mcore_bridge
