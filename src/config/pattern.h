// Reading per-layer patterns.
#pragma once

#include <string>

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

/// "N" or a list expression; throws ValueError naming `field` for anything else.
Pattern parse_pattern(const std::string& text, const char* field);

}  // namespace mcore_bridge
