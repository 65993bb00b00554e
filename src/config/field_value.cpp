#include "config/field_value.h"

#include <cmath>

#include "config/pattern.h"
#include "config/pipeline_layout.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

[[noreturn]] void wrong(const char* name, const Json& value, const char* expected) {
  fail("ModelConfig.", name, ": ", value.dump(), " is not ", expected);
}

struct DTypeName {
  const char* name;
  DType dtype;
};
constexpr DTypeName kDTypes[] = {
    {"float32", at::kFloat}, {"fp32", at::kFloat},   {"float", at::kFloat}, {"bfloat16", at::kBFloat16},
    {"bf16", at::kBFloat16}, {"float16", at::kHalf}, {"fp16", at::kHalf},   {"half", at::kHalf},
};

}  // namespace

void read_field(const char* name, const Json& value, bool& field) {
  if (!value.is_boolean()) wrong(name, value, "true or false");
  field = value.get<bool>();
}

void read_field(const char* name, const Json& value, int64_t& field) {
  if (value.is_number_integer()) {
    field = value.get<int64_t>();
  } else if (value.is_number_float() && std::floor(value.get<double>()) == value.get<double>() &&
             std::abs(value.get<double>()) < 1e15) {
    field = static_cast<int64_t>(value.get<double>());
  } else {
    wrong(name, value, "an integer");
  }
}

void read_field(const char* name, const Json& value, double& field) {
  if (!value.is_number()) wrong(name, value, "a number");
  field = value.get<double>();
}

void read_field(const char* name, const Json& value, std::string& field) {
  if (!value.is_string()) wrong(name, value, "a string");
  field = value.get<std::string>();
}

void read_field(const char* name, const Json& value, OptInt& field) { read_field(name, value, field.emplace()); }
void read_field(const char* name, const Json& value, OptDouble& field) { read_field(name, value, field.emplace()); }
void read_field(const char* name, const Json& value, OptString& field) { read_field(name, value, field.emplace()); }

void read_field(const char* name, const Json& value, IntList& field) {
  field.clear();
  if (value.is_array()) {
    for (const auto& item : value) read_field(name, item, field.emplace_back());
    return;
  }
  if (!value.is_string()) wrong(name, value, "a list of integers or \"a,b\"");
  std::string text;
  for (const char c : value.get<std::string>()) {
    if (c != '(' && c != ')' && c != ' ') text += c;
  }
  size_t start = 0;
  while (start < text.size()) {
    const auto end = std::min(text.find(',', start), text.size());
    try {
      size_t used = 0;
      const auto part = text.substr(start, end - start);
      field.push_back(std::stoll(part, &used));
      if (used != part.size()) wrong(name, value, "\"a,b\"");
    } catch (const std::logic_error&) {
      wrong(name, value, "a list of integers or \"a,b\"");
    }
    start = end + 1;
  }
}

void read_field(const char* name, const Json& value, DoubleList& field) {
  field.clear();
  if (!value.is_array()) return read_field(name, value, field.emplace_back());  // one number: a list of it
  for (const auto& item : value) read_field(name, item, field.emplace_back());
}

void read_field(const char* name, const Json& value, StringList& field) {
  if (!value.is_array() && !value.is_string()) wrong(name, value, "a list of strings");
  field.clear();
  if (value.is_string()) return read_field(name, value, field.emplace_back());  // one word: a list of it
  for (const auto& item : value) read_field(name, item, field.emplace_back());
}

void read_field(const char* name, const Json& value, Pattern& field) {
  if (value.is_string()) {
    field = parse_pattern(value.get<std::string>(), name);
  } else if (value.is_array()) {
    field = {};
    read_field(name, value, field.list);
  } else {
    field = {};
    read_field(name, value, field.every.emplace());
  }
}

void read_field(const char*, const Json& value, StageLayout& field) { field.stages = parse_pipeline_layout(value); }

void read_field(const char* name, const Json& value, Json& field) {
  field = value;
  if (value.is_string()) {
    field = Json::parse(value.get<std::string>(), nullptr, /*allow_exceptions=*/false);
  }
  if (field.is_null() && !value.is_string()) return;
  if (!field.is_object()) wrong(name, value, "a dictionary (or its JSON)");
  if (field.contains("type") && !field.contains("rope_type")) field["rope_type"] = field["type"];
}

void read_field(const char* name, const Json& value, DType& field) {
  if (!value.is_string()) wrong(name, value, "a dtype name");
  auto text = value.get<std::string>();
  if (text.starts_with("torch.")) text = text.substr(6);
  for (const auto& entry : kDTypes) {
    if (text == entry.name) {
      field = entry.dtype;
      return;
    }
  }
  wrong(name, value, "float32, bfloat16 or float16");
}

namespace {

template <class T>
Json optional_json(const std::optional<T>& field) {
  return field ? Json(*field) : Json(nullptr);
}

}  // namespace

Json write_field(bool field) { return field; }
Json write_field(int64_t field) { return field; }
Json write_field(double field) { return field; }
Json write_field(const std::string& field) { return field; }
Json write_field(const OptInt& field) { return optional_json(field); }
Json write_field(const OptDouble& field) { return optional_json(field); }
Json write_field(const OptString& field) { return optional_json(field); }
Json write_field(const IntList& field) { return field; }
Json write_field(const DoubleList& field) { return field; }
Json write_field(const StringList& field) { return field; }
Json write_field(const Json& field) { return field; }

Json write_field(const StageLayout& field) { return field.empty() ? Json(nullptr) : Json(field.text()); }

Json write_field(const Pattern& field) {
  if (field.every) return *field.every;
  return field.list.empty() ? Json(nullptr) : Json(field.list);
}

Json write_field(DType field) {
  for (const auto& entry : kDTypes) {
    if (entry.dtype == field) return entry.name;
  }
  return nullptr;
}

}  // namespace mcore_bridge
