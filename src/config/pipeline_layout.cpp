#include "config/pipeline_layout.h"

#include <algorithm>
#include <map>
#include <string_view>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

constexpr const char* kField = "ModelConfig.pipeline_model_parallel_layout: ";
constexpr size_t kMostSymbols = 1 << 20;  // stops (((t*9999)*9999)*9999) before it fills memory

/// Unrolls repetitions: a recursive descent over `x*N` and `(...)*N`.
class Unroller {
 public:
  explicit Unroller(const std::string& text) : text_(text) {}

  std::string run() {
    auto result = sequence();
    if (at_ < text_.size()) fail(kField, "'", text_, "': ')' at position ", at_, " closes nothing");
    return result;
  }

 private:
  std::string sequence() {
    std::string result;
    while (at_ < text_.size() && text_[at_] != ')') {
      const char symbol = text_[at_++];
      if (symbol == ',' || symbol == ' ') continue;
      std::string piece(1, symbol);
      if (symbol == '(') {
        const auto opened = at_ - 1;
        piece = sequence();
        MCB_CHECK(at_ < text_.size(), kField, "'", text_, "': '(' at position ", opened, " is not closed");
        ++at_;
      } else if (std::string_view("EtmL|").find(symbol) == std::string_view::npos) {
        fail(kField, "'", text_, "': '", symbol, "' at position ", at_ - 1,
             " is none of E (embedding), t (decoder layer), m (MTP layer), L (loss), | (next stage), *N, ( and )");
      }
      for (auto count = repetitions(); count > 0; --count) {
        result += piece;
        MCB_CHECK(result.size() <= kMostSymbols, kField, "'", text_, "': unrolls to more than ", kMostSymbols,
                  " symbols");
      }
    }
    return result;
  }

  int64_t repetitions() {
    if (at_ >= text_.size() || text_[at_] != '*') return 1;
    ++at_;
    int64_t count = 0;
    const auto first = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9' && count <= 1'000'000)
      count = count * 10 + (text_[at_++] - '0');
    MCB_CHECK(at_ > first, kField, "'", text_, "': '*' at position ", first - 1, " is not followed by a number");
    MCB_CHECK(count > 0, kField, "'", text_, "': repeats something 0 times");
    return count;
  }

  const std::string& text_;
  size_t at_ = 0;
};

std::vector<std::string> split_stages(const std::string& unrolled) {
  std::vector<std::string> stages(1);
  for (const char symbol : unrolled) {
    if (symbol == '|') {
      stages.emplace_back();
    } else {
      stages.back() += symbol;
    }
  }
  return stages;
}

std::string listed_stage(const Json& stage) {
  if (stage.is_string()) {
    const auto unrolled = Unroller(stage.get_ref<const std::string&>()).run();
    MCB_CHECK(unrolled.find('|') == std::string::npos, kField, stage.dump(),
              " in a list is one stage; it must not hold '|'");
    return unrolled;
  }
  static const std::map<std::string, char> kNames = {{"embedding", 'E'}, {"decoder", 't'}, {"mtp", 'm'}, {"loss", 'L'},
                                                     {"E", 'E'},         {"t", 't'},       {"m", 'm'},   {"L", 'L'}};
  MCB_CHECK(stage.is_array(), kField, stage.dump(), " is neither a stage such as \"Ett\" nor a list of layers");
  std::string result;
  for (const auto& layer : stage) {
    const auto found = layer.is_string() ? kNames.find(layer.get<std::string>()) : kNames.end();
    MCB_CHECK(found != kNames.end(), kField, layer.dump(), " is none of embedding, decoder, mtp, loss");
    result += found->second;
  }
  return result;
}

/// Chunks from how many layers each has; the first embeds, the last computes the loss.
std::vector<ChunkLayout> from_counts(const std::vector<int64_t>& counts) {
  std::vector<ChunkLayout> result;
  int64_t first = 0;
  for (const auto count : counts) {
    result.push_back({.layers = {first, count}});
    first += count;
  }
  result.front().embedding = true;
  result.back().loss = true;
  return result;
}

std::vector<ChunkLayout> explicit_layout(const ModelConfig& c) {
  const auto& stages = c.pipeline_model_parallel_layout.stages;
  const auto text = c.pipeline_model_parallel_layout.text();
  const auto bad = [&](const auto&... what) {
    fail(kField, text, ": ", what..., "; for this model and as many stages ",
         even_layout(c.num_layers, static_cast<int64_t>(stages.size())), " works");
  };
  const auto count = [&](char symbol) { return std::count(text.begin(), text.end(), symbol); };
  if (count('E') != 1 || stages.front().find('E') != 0) bad("E (embedding) must come once, first of all");
  if (count('L') != 1 || stages.back().empty() || stages.back().back() != 'L')
    bad("L (loss) must come once, last of all");
  if (count('m') != 0) bad("it has ", count('m'), " MTP layers (m), the model has none");
  if (count('t') != c.num_layers) bad("it has ", count('t'), " decoder layers (t), the model ", c.num_layers);
  std::vector<int64_t> counts;
  for (const auto& stage : stages) counts.push_back(std::count(stage.begin(), stage.end(), 't'));
  return from_counts(counts);
}

std::vector<ChunkLayout> uneven_layout(const ModelConfig& c) {
  const auto stages = c.pipeline_model_parallel_size, chunks = c.virtual_stages();
  const auto first = c.num_layers_in_first_pipeline_stage, last = c.num_layers_in_last_pipeline_stage;
  const auto bad = [&](const auto&... what) {
    fail("num_layers_in_first/last_pipeline_stage: ", what..., "; or give pipeline_model_parallel_layout, e.g. ",
         even_layout(c.num_layers, stages * chunks));
  };
  if (stages == 1) bad("needs pipeline_model_parallel_size above 1");
  const auto middle = c.num_layers - first.value_or(0) - last.value_or(0);
  if (first.value_or(1) <= 0 || last.value_or(1) <= 0 || middle < 0)
    bad(first.value_or(0), " and ", last.value_or(0), " do not fit into num_layers ", c.num_layers);
  const auto others = stages - (first ? 1 : 0) - (last ? 1 : 0);
  if (others > 0 ? middle == 0 || middle % (others * chunks) != 0 : middle != 0)
    bad("the ", middle, " layers left do not spread evenly over the ", others, " other pipeline stages",
        chunks > 1 ? " of " + std::to_string(chunks) + " virtual stages each" : "");
  for (const auto& given : {first, last}) {
    if (given && *given % chunks != 0)
      bad(*given, " layers do not spread evenly over the ", chunks, " virtual stages of a pipeline stage");
  }
  std::vector<int64_t> counts;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t stage = 0; stage < stages; ++stage) {
      const bool is_first = first && stage == 0, is_last = last && stage == stages - 1;
      counts.push_back((is_first ? *first : is_last ? *last : middle / others) / chunks);
    }
  }
  return from_counts(counts);
}

int64_t counted_layers(const ModelConfig& c) {
  return c.num_layers + (c.account_for_embedding_in_pipeline_split ? 1 : 0) +
         (c.account_for_loss_in_pipeline_split ? 1 : 0);
}

std::vector<ChunkLayout> balanced_layout(const ModelConfig& c) {
  const auto stages = c.pipeline_model_parallel_size, chunks = c.virtual_stages(), counted = counted_layers(c);
  const auto works = [&](int64_t n) { return counted % (n * chunks) == 0; };
  if (!works(stages)) {
    std::string sizes;
    for (int64_t n = 1; n <= counted; ++n) {
      if (works(n)) sizes += (sizes.empty() ? "" : ", ") + std::to_string(n);
    }
    fail("pipeline_model_parallel_size ", stages, chunks > 1 ? " x virtual stages " + std::to_string(chunks) : "",
         " does not split num_layers ", c.num_layers,
         counted > c.num_layers ? " (with embedding/loss counted as layers)" : "", " evenly; use ",
         sizes.empty() ? "fewer virtual stages" : "one of " + sizes, ", or pipeline_model_parallel_layout ",
         even_layout(c.num_layers, stages * chunks),
         chunks == 1 ? ", or set num_layers_in_first_pipeline_stage / num_layers_in_last_pipeline_stage" : "");
  }
  std::vector<int64_t> counts(stages * chunks, counted / (stages * chunks));
  if (c.account_for_embedding_in_pipeline_split) --counts.front();
  if (c.account_for_loss_in_pipeline_split) --counts.back();
  // One stage that holds both cannot give up more than it has; num_layers is at least 1.
  return from_counts(counts);
}

}  // namespace

std::string StageLayout::text() const {
  std::string result;
  for (size_t i = 0; i < stages.size(); ++i) result += (i ? "|" : "") + stages[i];
  return result;
}

std::vector<std::string> parse_pipeline_layout(const Json& layout) {
  if (layout.is_string()) return split_stages(Unroller(layout.get_ref<const std::string&>()).run());
  MCB_CHECK(layout.is_array() && !layout.empty(), kField, layout.dump(),
            " is neither a layout such as \"Et*3|t*4L\" nor a list of stages");
  std::vector<std::string> stages;
  for (const auto& stage : layout) stages.push_back(listed_stage(stage));
  return stages;
}

std::string even_layout(int64_t num_layers, int64_t chunks) {
  std::vector<int64_t> counts(chunks, num_layers / chunks);
  // The remainder goes to the chunks in the middle, from there outwards.
  const auto rest = num_layers % chunks, first = (chunks - rest) / 2;
  for (int64_t i = 0; i < rest; ++i) ++counts[first + i];
  std::string text = "E";
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    if (chunk > 0) text += "|";
    if (counts[chunk] == 1) text += "t";
    if (counts[chunk] > 1) text += "t*" + std::to_string(counts[chunk]);
  }
  return text + "L";
}

std::vector<ChunkLayout> pipeline_layout(const ModelConfig& c) {
  if (!c.pipeline_model_parallel_layout.empty()) return explicit_layout(c);
  if (c.num_layers_in_first_pipeline_stage || c.num_layers_in_last_pipeline_stage) return uneven_layout(c);
  return balanced_layout(c);
}

void derive_virtual_stages(ModelConfig& c) {
  const auto stages = c.pipeline_model_parallel_size;
  if (stages <= 0) return;  // said by the range checks
  auto derive = [&](int64_t chunks, const char* from) {
    MCB_CHECK(!c.virtual_pipeline_model_parallel_size || *c.virtual_pipeline_model_parallel_size == chunks,
              "virtual_pipeline_model_parallel_size ", c.virtual_stages(), " contradicts ", from, ", which makes ",
              chunks, "; leave one of them out");
    if (chunks > 1) c.virtual_pipeline_model_parallel_size = chunks;
  };
  if (!c.pipeline_model_parallel_layout.empty()) {
    const auto chunks = static_cast<int64_t>(c.pipeline_model_parallel_layout.stages.size());
    MCB_CHECK(chunks % stages == 0, kField, "its ", chunks, " stages do not divide by pipeline_model_parallel_size ",
              stages, "; ", even_layout(std::max<int64_t>(0, c.num_layers), (chunks + stages - 1) / stages * stages),
              " has as many as it takes");
    derive(chunks / stages, "pipeline_model_parallel_layout");
  }
  if (c.num_layers_per_virtual_pipeline_stage) {
    const auto each = *c.num_layers_per_virtual_pipeline_stage, counted = counted_layers(c);
    MCB_CHECK(each > 0, "num_layers_per_virtual_pipeline_stage: ", each, " must be at least 1");
    MCB_CHECK(c.pipeline_model_parallel_layout.empty() && !c.num_layers_in_first_pipeline_stage &&
                  !c.num_layers_in_last_pipeline_stage,
              "num_layers_per_virtual_pipeline_stage speaks of even stages; with pipeline_model_parallel_layout or "
              "num_layers_in_first/last_pipeline_stage give virtual_pipeline_model_parallel_size");
    MCB_CHECK(counted > 0 && counted % (stages * each) == 0, "num_layers_per_virtual_pipeline_stage ", each,
              " x pipeline_model_parallel_size ", stages, " does not divide num_layers ", c.num_layers,
              counted > c.num_layers ? " (with embedding/loss counted as layers)" : "",
              "; pipeline_model_parallel_layout ", even_layout(c.num_layers, stages), " works");
    derive(counted / (stages * each), "num_layers_per_virtual_pipeline_stage");
  }
}

void check_pipeline(const ModelConfig& c) {
  const auto stages = c.pipeline_model_parallel_size, chunks = c.virtual_stages();
  const bool sizes = c.num_layers_in_first_pipeline_stage || c.num_layers_in_last_pipeline_stage;
  const bool accounts = c.account_for_embedding_in_pipeline_split || c.account_for_loss_in_pipeline_split;
  MCB_CHECK(chunks == 1 || stages > 1, "virtual_pipeline_model_parallel_size ", chunks,
            " needs pipeline_model_parallel_size above 1");
  MCB_CHECK(!(sizes && accounts),
            "num_layers_in_first/last_pipeline_stage and account_for_embedding/loss_in_pipeline_split exclude each "
            "other");
  MCB_CHECK(c.pipeline_model_parallel_layout.empty() || !(sizes || accounts),
            "pipeline_model_parallel_layout says all; leave num_layers_in_first/last_pipeline_stage and "
            "account_for_embedding/loss_in_pipeline_split out");
  const auto group = c.microbatch_group_size_per_vp_stage.value_or(stages);
  MCB_CHECK(group >= stages, "microbatch_group_size_per_vp_stage ", group,
            " must be at least pipeline_model_parallel_size ", stages,
            " (a chunk's first micro-batch comes back to this "
            "rank for its next chunk after so many)");
  MCB_CHECK(c.pipeline_schedule == "1f1b" || c.pipeline_schedule == "interleaved" || c.pipeline_schedule == "zb-h1",
            "ModelConfig.pipeline_schedule: '", c.pipeline_schedule, "' is not one of 1f1b, interleaved, zb-h1");
  MCB_CHECK(c.pipeline_schedule != "zb-h1" || chunks == 1, "pipeline_schedule zb-h1 has no virtual stages, found ",
            chunks, "; leave virtual_pipeline_model_parallel_size out, or use 1f1b");
  MCB_CHECK(
      c.pipeline_schedule != "interleaved" || chunks > 1,
      "pipeline_schedule interleaved needs virtual_pipeline_model_parallel_size above 1 (or num_layers_per_virtual_"
      "pipeline_stage, or a pipeline_model_parallel_layout of more stages)");
  pipeline_layout(c);
}

}  // namespace mcore_bridge
