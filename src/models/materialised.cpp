#include "mcore_bridge/materialised.h"

#include <utility>

#include "models/gpt_model.h"

namespace mcore_bridge {

MaterialisedParameters::MaterialisedParameters(std::vector<std::shared_ptr<GPTModel>> chunks,
                                               const std::function<bool(const std::string&)>& wanted)
    : chunks_(std::move(chunks)) {
  for (const auto& chunk : chunks_) {
    if (chunk->gate()) chunk->gate()->hold(wanted);
  }
}

MaterialisedParameters::~MaterialisedParameters() {
  for (const auto& chunk : chunks_) {
    if (chunk->gate()) chunk->gate()->release_all();
  }
}

}  // namespace mcore_bridge
