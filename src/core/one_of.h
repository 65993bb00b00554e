// A word that must be one of a few.
#pragma once

#include <initializer_list>
#include <string>

#include "mcore_bridge/error.h"

namespace mcore_bridge {

/// ValueError "<field>: '<value>' <complaint> a, b, c" when the value is none of these.
inline void one_of(const std::string& field, const std::string& value, std::initializer_list<const char*> allowed,
                   const char* complaint = "is not one of") {
  std::string list;
  for (const auto* word : allowed) {
    if (value == word) return;
    list += (list.empty() ? "" : ", ") + std::string(word);
  }
  fail(field, ": '", value, "' ", complaint, " ", list);
}

}  // namespace mcore_bridge
