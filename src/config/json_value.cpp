#include "config/json_value.h"

#include "mcore_bridge/error.h"

namespace mcore_bridge {

const Json* json_find(const Json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

bool json_bool(const Json& object, const char* key, bool otherwise, const char* where) {
  const auto* value = json_find(object, key);
  if (!value) return otherwise;
  MCB_CHECK(value->is_boolean(), where, ": ", key, " is ", value->dump(), ", expected true or false");
  return value->get<bool>();
}

int64_t json_int(const Json& object, const char* key, int64_t otherwise, const char* where) {
  const auto* value = json_find(object, key);
  if (!value) return otherwise;
  MCB_CHECK(value->is_number_integer(), where, ": ", key, " is ", value->dump(), ", expected an integer");
  return value->get<int64_t>();
}

double json_number(const Json& object, const char* key, double otherwise, const char* where) {
  const auto* value = json_find(object, key);
  if (!value) return otherwise;
  MCB_CHECK(value->is_number(), where, ": ", key, " is ", value->dump(), ", expected a number");
  return value->get<double>();
}

std::string json_string(const Json& object, const char* key, const std::string& otherwise, const char* where) {
  const auto* value = json_find(object, key);
  if (!value) return otherwise;
  MCB_CHECK(value->is_string(), where, ": ", key, " is ", value->dump(), ", expected a string");
  return value->get<std::string>();
}

}  // namespace mcore_bridge
