// Patterns such as "[0]*3+[1]*45": sums of lists, each possibly repeated.
#include "config/pattern.h"

#include <cctype>

#include "mcore_bridge/error.h"
#include "mcore_bridge/model_config.h"

namespace mcore_bridge {
namespace {

class PatternParser {
 public:
  PatternParser(const std::string& text, const char* field) : text_(text), field_(field) {}

  IntList parse() {
    auto result = sum();
    if (at_ < text_.size()) bad("unexpected '" + text_.substr(at_) + "'");
    return result;
  }

 private:
  static constexpr size_t kLongest = 1 << 20;  // no model has more layers; a typo must not fill the memory

  IntList sum() {
    auto result = product();
    while (take('+')) {
      const auto more = product();
      result.insert(result.end(), more.begin(), more.end());
      check_length(result.size());
    }
    return result;
  }

  IntList product() {
    IntList result;
    int64_t times = 1;
    bool has_list = false;
    do {
      if (peek() == '[') {
        if (has_list) bad("a list cannot be multiplied by a list");
        result = list();
        has_list = true;
      } else if (take('(')) {
        if (has_list) bad("a list cannot be multiplied by a list");
        result = sum();
        if (!take(')')) bad("')' is missing");
        has_list = true;
      } else {
        times *= number();
        check_length(static_cast<size_t>(times));
      }
    } while (take('*'));
    if (!has_list) bad("a number alone is not a list");
    IntList repeated;
    check_length(result.size() * static_cast<size_t>(times));
    for (int64_t i = 0; i < times; ++i) repeated.insert(repeated.end(), result.begin(), result.end());
    return repeated;
  }

  IntList list() {
    take('[');
    IntList result;
    while (peek() != ']') {
      result.push_back(number());
      if (!take(',') && peek() != ']') bad("']' or ',' expected");
    }
    take(']');
    return result;
  }

  int64_t number() {
    skip();
    const auto start = at_;
    while (at_ < text_.size() && std::isdigit(static_cast<unsigned char>(text_[at_]))) ++at_;
    if (start == at_) bad("a number is expected at position " + std::to_string(at_));
    if (at_ - start > 7) bad("the number is too large");
    return std::stoll(text_.substr(start, at_ - start));
  }

  void skip() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
  }
  char peek() {
    skip();
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  void check_length(size_t length) {
    if (length > kLongest) bad("more entries than any model has layers");
  }
  [[noreturn]] void bad(const std::string& why) {
    fail(field_, ": '", text_, "' is not a pattern such as [0]*3+[1]*45: ", why);
  }

  const std::string& text_;
  const char* field_;
  size_t at_ = 0;
};

}  // namespace

Pattern parse_pattern(const std::string& text, const char* field) {
  Pattern result;
  bool digits = !text.empty();
  for (const char c : text) {
    MCB_CHECK(std::isdigit(static_cast<unsigned char>(c)) || std::string(",[]()+* ").find(c) != std::string::npos,
              field, ": '", text, "' may hold only digits and , [ ] ( ) + *");
    digits = digits && std::isdigit(static_cast<unsigned char>(c));
  }
  if (digits && text.size() <= 7) {
    result.every = std::stoll(text);
  } else {
    result.list = PatternParser(text, field).parse();
  }
  return result;
}

IntList Pattern::expand(int64_t num_layers, int64_t nth, const char* field) const {
  if (every) {
    MCB_CHECK(*every > 0, field, ": ", *every, " must be at least 1");
    IntList result;
    for (int64_t layer = 0; layer < num_layers; ++layer) result.push_back((layer + 1) % *every == 0 ? nth : 1 - nth);
    return result;
  }
  MCB_CHECK(static_cast<int64_t>(list.size()) == num_layers, field, ": the pattern has ", list.size(),
            " entries, the model ", num_layers, " layers");
  for (const auto flag : list) MCB_CHECK(flag == 0 || flag == 1, field, ": entries must be 0 or 1, found ", flag);
  return list;
}

}  // namespace mcore_bridge
