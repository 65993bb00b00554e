// Typed look-ups in dictionaries users and model authors write.
#pragma once

#include <string>

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

/// The value of `key`; null counts as absent. Nullptr when there is none, or when `object` is no object.
const Json* json_find(const Json& object, const char* key);

/// The value of `key`, or `otherwise` when it is absent. A value of another type is a ValueError that starts with
/// `where` and names the key.
bool json_bool(const Json& object, const char* key, bool otherwise, const char* where);
int64_t json_int(const Json& object, const char* key, int64_t otherwise, const char* where);
double json_number(const Json& object, const char* key, double otherwise, const char* where);
std::string json_string(const Json& object, const char* key, const std::string& otherwise, const char* where);

}  // namespace mcore_bridge
