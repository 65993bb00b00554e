#include "train/graph_shape.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>

#include "layers/attention/core_attention.h"
#include "mcore_bridge/bridge.h"
#include "mcore_bridge/error.h"
#include "models/gpt_model.h"
#include "train/graph_input.h"

namespace mcore_bridge {
namespace {

constexpr int64_t kVocabulary = 23;

std::shared_ptr<GPTModel> model_of(const nlohmann::json& more) {
  nlohmann::json hf{{"model_type", "qwen3"},     {"hidden_size", 16},          {"intermediate_size", 32},
                    {"num_hidden_layers", 2},    {"num_attention_heads", 4},   {"num_key_value_heads", 2},
                    {"vocab_size", kVocabulary}, {"tie_word_embeddings", true}};
  hf.update(more);
  auto config = ModelConfig::from_json(ModelConfig::from_hf(hf));
  config.finalize();
  Chunks chunks{build_model(config)};
  initialize(chunks, 3);
  return chunks[0];
}

/// A row of documents of these lengths; labels shifted within each, a few left out.
ForwardInput packed(const std::vector<int64_t>& lengths, uint64_t seed) {
  PackedSeqParams documents{.cu_seqlens_host = {0}};
  for (const auto length : lengths) {
    documents.cu_seqlens_host.push_back(documents.cu_seqlens_host.back() + length);
    documents.max_seqlen = std::max(documents.max_seqlen, length);
  }
  documents.cu_seqlens = at::tensor(documents.cu_seqlens_host, at::kLong).to(at::kInt);
  const auto tokens = documents.cu_seqlens_host.back();
  std::mt19937 generator(seed);
  ForwardInput batch;
  batch.input_ids = at::empty({1, tokens}, at::kLong);
  for (int64_t i = 0; i < tokens; ++i) batch.input_ids[0][i] = static_cast<int64_t>(generator() % kVocabulary);
  batch.labels = batch.input_ids.roll(-1, 1);
  for (const auto end : documents.cu_seqlens_host) {
    if (end > 0) batch.labels[0][end - 1] = -100;
  }
  batch.packed = std::move(documents);
  return batch;
}

/// As eager work on the CPU needs it.
ForwardInput with_host_ends(ForwardInput batch) {
  const auto ends = batch.packed->cu_seqlens.to(at::kLong);
  batch.packed->cu_seqlens_host.assign(ends.const_data_ptr<int64_t>(), ends.const_data_ptr<int64_t>() + ends.numel());
  return batch;
}

struct Result {
  double loss;
  std::vector<std::pair<std::string, at::Tensor>> gradients;
};

Result train_on(GPTModel& model, ForwardInput batch) {
  batch.loss_weight = at::scalar_tensor(1.0 / 16, at::kDouble);
  const auto loss = model.forward(batch);
  loss.backward();
  Result result{loss.item<double>(), {}};
  for (auto& parameter : model.named_parameters()) {
    result.gradients.emplace_back(parameter.name, parameter.tensor.grad().clone());
    parameter.tensor.mutable_grad().reset();
  }
  return result;
}

double relative(const at::Tensor& a, const at::Tensor& b) {
  return ((a - b).norm() / b.norm().clamp_min(1e-30)).item<double>();
}

}  // namespace

TEST(GraphShape, FewAndNeverMuchLarger) {
  std::set<int64_t> sizes;
  for (int64_t tokens = 1; tokens <= 40000; ++tokens) {
    const auto shape = graph_shape(tokens, 5, tokens / 2 + 1);
    ASSERT_GE(shape.tokens, tokens);
    ASSERT_LE(shape.tokens - tokens, std::max<int64_t>(7, tokens / 8));
    ASSERT_EQ(graph_shape(shape.tokens, 5, 1).tokens, shape.tokens);
    ASSERT_GE(shape.longest, tokens / 2 + 1);
    ASSERT_LE(shape.longest, std::max<int64_t>(128, 2 * shape.tokens));
    if (tokens > 32768) sizes.insert(shape.tokens);
  }
  EXPECT_EQ(sizes, (std::set<int64_t>{36864, 40960}));
  for (const auto& [documents, expected] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 8}, {8, 8}, {9, 16}, {16, 16}, {17, 32}}) {
    EXPECT_EQ(graph_shape(4096, documents, 600).documents, expected);
  }
  EXPECT_EQ(graph_shape(4096, 3, 100).longest, 512);
  EXPECT_EQ(graph_shape(4096, 3, 1025).longest, 2048);
  EXPECT_EQ(graph_shape(200, 3, 100).longest, 256);  // no longer than the row
}

TEST(GraphShape, PackingsShareKeys) {
  auto key = [](const std::vector<int64_t>& lengths) { return shape_key(in_graph_shape(packed(lengths, 1))); };
  const auto known = key({300, 600, 100});
  EXPECT_EQ(key({700, 250, 40}), known);
  EXPECT_EQ(key({600, 100, 100, 100, 100}), known);
  EXPECT_NE(key({300, 600, 500}), known);                                                   // tokens
  EXPECT_NE(key({300, 500, 200}), known);                                                   // longest document
  EXPECT_NE(key({600, 50, 50, 50, 50, 50, 50, 50, 50}), known);                             // documents
  EXPECT_NE(shape_key(packed({300, 500, 200}, 1)), shape_key(packed({500, 300, 200}, 1)));  // ends known to the host

  std::set<std::vector<int64_t>> keys;
  std::mt19937 generator(5);
  for (int row = 0; row < 200; ++row) {  // rows of at most 2,048 tokens, nearly full
    std::vector<int64_t> lengths;
    for (int64_t left = 2048;;) {
      const auto length = static_cast<int64_t>(20 + generator() % 700);
      if (length > left) break;
      lengths.push_back(length);
      left -= length;
    }
    keys.insert(key(lengths));
  }
  EXPECT_LE(keys.size(), 24U);
}

/// Where documents end, tokens and labels are as they were; what follows is the row's beginning without loss.
TEST(GraphShape, RepeatsTheBeginning) {
  const auto batch = packed({3, 0, 30, 77}, 2);
  const auto shaped = in_graph_shape(batch);
  EXPECT_TRUE(shaped.packed->cu_seqlens_host.empty());
  EXPECT_EQ(shaped.packed->max_seqlen, 128);
  EXPECT_TRUE(at::equal(shaped.packed->cu_seqlens, at::tensor({0, 3, 3, 33, 110, 112, 112, 112, 112}, at::kInt)));
  EXPECT_TRUE(at::equal(shaped.input_ids.narrow(1, 0, 110), batch.input_ids));
  EXPECT_TRUE(at::equal(shaped.input_ids.narrow(1, 110, 2), batch.input_ids.narrow(1, 0, 2)));
  EXPECT_TRUE(at::equal(shaped.labels.narrow(1, 0, 110), batch.labels));
  EXPECT_TRUE(shaped.labels.narrow(1, 110, 2).eq(-100).all().item<bool>());
  EXPECT_FALSE(shaped.position_ids.defined());

  const auto tiny = in_graph_shape(packed({2, 1}, 2));  // more to fill than there is
  EXPECT_TRUE(at::equal(tiny.packed->cu_seqlens, at::tensor({0, 2, 3, 5, 6, 8, 8, 8, 8}, at::kInt)));
  EXPECT_EQ(tiny.input_ids.size(1), 8);
}

TEST(GraphShape, SameLossAndGradients) {
  const std::vector<nlohmann::json> models{
      nlohmann::json::object(),
      {{"model_type", "mistral"}, {"sliding_window", 5}},
      {{"model_type", "qwen2"}, {"tie_word_embeddings", false}},
  };
  for (const auto& fields : models) {
    const auto model = model_of(fields);
    for (const auto& lengths :
         std::vector<std::vector<int64_t>>{{100, 30, 7}, {1, 120, 1, 1, 11, 3, 8, 6, 2}, {5, 2}}) {
      auto batch = packed(lengths, 7);
      for (const bool positions : {false, true}) {
        if (positions) batch.position_ids = at::arange(batch.input_ids.size(1)).remainder(9).unsqueeze(0);
        const auto shaped = with_host_ends(in_graph_shape(batch));
        ASSERT_GT(shaped.input_ids.size(1), batch.input_ids.size(1));
        const auto plain = train_on(*model, batch), padded = train_on(*model, shaped);
        EXPECT_NEAR(padded.loss / plain.loss, 1, 1e-6);
        ASSERT_EQ(plain.gradients.size(), padded.gradients.size());
        for (size_t i = 0; i < plain.gradients.size(); ++i) {
          EXPECT_LT(relative(padded.gradients[i].second, plain.gradients[i].second), 1e-6) << plain.gradients[i].first;
        }
        // Nothing new: FP8 finds the largest magnitudes it would find without.
        auto unlabelled = shaped;
        unlabelled.labels = at::Tensor();
        const auto logits = model->forward(unlabelled).detach();
        const auto given = batch.input_ids.size(1), more = std::min(given, shaped.input_ids.size(1) - given);
        EXPECT_LT(relative(logits.narrow(1, given, more), logits.narrow(1, 0, more)), 1e-6);
      }
    }
  }
}

/// Attention on the CPU goes through documents one by one: it cannot do without their ends and says so.
TEST(GraphShape, AttentionOnTheHostNeedsTheEnds) {
  const auto model = model_of(nlohmann::json::object());
  EXPECT_TRUE(attention_reads_host_ends(model->config(), c10::kCPU));
  EXPECT_TRUE(attention_reads_host_ends(model->config(), c10::kCUDA));  // float32
  try {
    model->forward(in_graph_shape(packed({5, 2}, 1)));
    FAIL() << "went on";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("cu_seqlens_host is empty"), std::string::npos) << error.what();
  }
  auto config = model->config();
  config.params_dtype = at::kBFloat16;
  EXPECT_FALSE(attention_reads_host_ends(config, c10::kCUDA));
  config.softmax_type = "learnable";
  EXPECT_TRUE(attention_reads_host_ends(config, c10::kCUDA));
}

TEST(GraphInput, ViewsOfOneBuffer) {
  auto first = packed({30, 11}, 1), second = packed({9, 32}, 2);
  for (auto* batch : {&first, &second}) {
    batch->attention_mask = batch->input_ids.gt(11).view({1, 1, 1, 41});
    batch->loss_weight = at::scalar_tensor(batch == &first ? 0.25 : 0.5, at::kDouble);
    batch->balance_loss_share = 3;
  }
  second.labels = second.labels.t().contiguous().t();  // strides of its own
  GraphInput input(first, c10::kCPU);
  const auto place = input.batch().labels.const_data_ptr();
  for (const auto* batch : {&first, &second, &first}) {
    input.fill(*batch);
    std::vector<at::Tensor> expected;
    for_tensors(*batch, [&](const at::Tensor& tensor) { expected.push_back(tensor); });
    size_t i = 0;
    for_tensors(input.batch(), [&](const at::Tensor& tensor) {
      const auto& wanted = expected.at(i++);
      ASSERT_EQ(tensor.defined(), wanted.defined());
      if (!tensor.defined()) return;
      EXPECT_EQ(tensor.scalar_type(), wanted.scalar_type());
      EXPECT_TRUE(at::equal(tensor, wanted)) << i;
      EXPECT_TRUE(tensor.is_contiguous());
      EXPECT_EQ(tensor.storage().data(), input.batch().labels.storage().data());
    });
    EXPECT_EQ(i, expected.size());
  }
  EXPECT_EQ(input.batch().labels.const_data_ptr(), place);
  EXPECT_EQ(input.batch().balance_loss_share, 3);
  EXPECT_EQ(input.batch().packed->max_seqlen, first.packed->max_seqlen);
}

}  // namespace mcore_bridge
