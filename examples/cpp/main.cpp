// Loads a Hugging Face folder on one rank, without Python or process groups, and prints the likeliest next tokens.
//   next_token FOLDER TOKEN_ID [TOKEN_ID ...]
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "mcore_bridge/bridge.h"
#include "mcore_bridge/model.h"

int main(int count, char** words) {
  if (count < 3) {
    std::fprintf(stderr, "usage: %s FOLDER TOKEN_ID [TOKEN_ID ...]\n", words[0]);
    return 2;
  }
  try {
    const auto config = mcore_bridge::ModelConfig::from_folder(words[1]);
    const auto model = mcore_bridge::build_model(config);
    mcore_bridge::load_weights({model}, words[1]);

    std::vector<int64_t> ids;
    for (int i = 2; i < count; ++i) ids.push_back(std::strtoll(words[i], nullptr, 10));
    at::NoGradGuard no_grad;
    mcore_bridge::ForwardInput input;
    input.input_ids = at::tensor(ids, at::kLong).unsqueeze(0);
    const auto logits = mcore_bridge::forward(*model, input, /*gather_output=*/true)[0][-1];
    const auto [values, tokens] = logits.topk(5);
    for (int i = 0; i < 5; ++i) {
      std::printf("%lld %.6f\n", static_cast<long long>(tokens[i].item<int64_t>()), values[i].item<float>());
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
