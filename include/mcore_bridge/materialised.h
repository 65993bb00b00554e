// Whole parameters for a while, whatever training does with them.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace mcore_bridge {

class GPTModel;

/// While it lives, the parameters of the chunks (those whose name `wanted` accepts; empty: all) are in place on this
/// rank; what is written to them is kept. Made by all ranks together: fully sharded parameters
/// (data_parallel_sharding_strategy optim_grads_params) are gathered.
class MaterialisedParameters {
 public:
  explicit MaterialisedParameters(std::vector<std::shared_ptr<GPTModel>> chunks,
                                  const std::function<bool(const std::string&)>& wanted = {});
  ~MaterialisedParameters();
  MaterialisedParameters(const MaterialisedParameters&) = delete;
  MaterialisedParameters& operator=(const MaterialisedParameters&) = delete;

 private:
  std::vector<std::shared_ptr<GPTModel>> chunks_;
};

}  // namespace mcore_bridge
