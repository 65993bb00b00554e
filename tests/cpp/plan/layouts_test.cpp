// Every fused layout on paper: assembled on each rank of many splits, taken apart again, and against closed forms.
#include <gtest/gtest.h>

#include <map>

#include "mcore_bridge/error.h"
#include "plan/assemble.h"

namespace mcore_bridge {
namespace {

using Values = std::vector<uint32_t>;

int64_t numel(const std::vector<int64_t>& sizes) {
  int64_t product = 1;
  for (const auto size : sizes) product *= size;
  return product;
}

/// Whole tensors by name, every element different from all others.
class Tensors {
 public:
  void add(const HfTensor& tensor) {
    auto& values = tensors_[tensor.name];
    if (!values.empty()) return;
    values.resize(static_cast<size_t>(numel(tensor.sizes())));
    for (auto& value : values) value = ++last_;
  }
  const Values& at(const std::string& name) const { return tensors_.at(name); }
  size_t elements() const { return last_; }

  Values assembled(const ParameterPlan& plan) {
    std::vector<const std::byte*> pointers;
    for (const auto& tensor : plan.tensors) {
      add(tensor);
      pointers.push_back(reinterpret_cast<const std::byte*>(tensors_.at(tensor.name).data()));
    }
    Values result(static_cast<size_t>(numel(plan.sizes)), 7);
    assemble(plan, 4, pointers, reinterpret_cast<std::byte*>(result.data()));
    return result;
  }

 private:
  std::map<std::string, Values> tensors_;
  uint32_t last_ = 0;
};

/// Takes parameters apart into zeroed tensors and counts how often each element is owned.
class Inverse {
 public:
  void add(const ParameterPlan& plan, const Values& parameter) {
    std::vector<std::byte*> pointers;
    for (const auto& tensor : plan.tensors) {
      auto& values = tensors_[tensor.name];
      values.resize(static_cast<size_t>(numel(tensor.sizes())));
      pointers.push_back(reinterpret_cast<std::byte*>(values.data()));
    }
    disassemble(plan, 4, reinterpret_cast<const std::byte*>(parameter.data()), pointers);
    for (const auto& region : plan.regions) {
      if (region.owner) owned_ += static_cast<size_t>(region.rows * region.cols);
    }
  }
  void expect_equal(const Tensors& tensors, const std::string& what) const {
    EXPECT_EQ(owned_, tensors.elements()) << what;
    for (const auto& [name, values] : tensors_) EXPECT_EQ(values, tensors.at(name)) << what << " " << name;
  }

 private:
  std::map<std::string, Values> tensors_;
  size_t owned_ = 0;
};

struct Case {
  WeightRule rule;
  std::vector<int> sizes = {1, 2, 4, 8};
};

WeightRule qkv(Fuse fuse, int64_t heads, int64_t groups, bool gate, int64_t cols = 5) {
  const HeadLayout layout{heads, groups, 3, gate};
  return {.name = "qkv",
          .hf = {"q", "k", "v"},
          .rows = layout.query_rows() + 2 * layout.key_rows(),
          .cols = cols,
          .shard = Shard::kColumn,
          .fuse = fuse,
          .heads = layout};
}

WeightRule joined(WeightRule rule) {
  for (auto& name : rule.hf) name = "joined";
  return rule;
}

WeightRule groups(std::vector<std::string> hf, std::vector<int64_t> part_rows, int64_t cols = 5) {
  int64_t rows = 0;
  for (const auto part : part_rows) rows += part;
  return {.name = "groups",
          .hf = std::move(hf),
          .rows = rows,
          .cols = cols,
          .shard = Shard::kColumn,
          .fuse = Fuse::kGroups,
          .grouping = {8, std::move(part_rows)}};
}

WeightRule depthwise(WeightRule rule) {
  rule.depthwise = true;
  return rule;
}

WeightRule gate_up(Fuse fuse, std::vector<std::string> hf, bool transposed, int64_t cols = 6) {
  return {.name = "fc1",
          .hf = std::move(hf),
          .rows = 32,
          .cols = cols,
          .shard = Shard::kColumn,
          .fuse = fuse,
          .transposed = transposed};
}

WeightRule plain(int64_t rows, int64_t cols, Shard shard, bool transposed = false) {
  return {.name = "w", .hf = {"w"}, .rows = rows, .cols = cols, .shard = shard, .transposed = transposed};
}

/// GDN of 8 key heads of width 2 and 16 value heads of width 3: rows of q, k, v, z, b, a.
const std::vector<int64_t> kGdn = {16, 16, 48, 48, 16, 16};

std::vector<Case> dense_cases() {
  std::vector<Case> cases;
  for (const auto fuse : {Fuse::kQkv, Fuse::kSplitQkv}) {
    for (const bool gate : {false, true}) {
      for (const int64_t kv : {1, 2, 8, 16}) {
        cases.push_back({qkv(fuse, 16, kv, gate)});
        cases.push_back({qkv(fuse, 16, kv, gate, 0)});  // its bias
        cases.push_back({joined(qkv(fuse, 16, kv, gate))});
      }
    }
  }
  cases.push_back({gate_up(Fuse::kGateUp, {"gate", "up"}, false)});
  cases.push_back({gate_up(Fuse::kGateUp, {"gate", "up"}, false, 0)});
  cases.push_back({gate_up(Fuse::kGateUp, {"gate_up", "gate_up"}, false)});
  cases.push_back({gate_up(Fuse::kGateUp, {"gate_up", "gate_up"}, true)});
  cases.push_back({gate_up(Fuse::kInterleaved, {"gate_up", "gate_up"}, false)});
  cases.push_back({gate_up(Fuse::kInterleaved, {"gate_up", "gate_up"}, true)});
  cases.push_back({groups({"qkv", "qkv", "qkv", "z", "b", "a"}, kGdn)});
  cases.push_back({groups({"qkv", "qkv", "qkv", "z"}, {16, 16, 48, 48})});
  cases.push_back({groups({"b", "a"}, {16, 16})});
  cases.push_back({groups({"qkvz", "ba"}, {128, 32})});
  cases.push_back({depthwise(groups({"conv", "conv", "conv"}, {16, 16, 48}, 4))});
  // MLA and the rest: one to one.
  cases.push_back({plain(48, 7, Shard::kColumn)});
  cases.push_back({plain(7, 48, Shard::kRow)});
  cases.push_back({plain(7, 48, Shard::kRow, true)});
  cases.push_back({plain(48, 7, Shard::kColumn, true)});
  cases.push_back({plain(7, 9, Shard::kReplicated)});
  cases.push_back({plain(16, 0, Shard::kColumn)});  // A_log, dt_bias, sinks
  return cases;
}

}  // namespace

TEST(Layouts, EveryElementOnceAndTakenApartBitForBit) {
  for (const auto& [rule, sizes] : dense_cases()) {
    for (const int tp : sizes) {
      Tensors tensors;
      Inverse inverse;
      for (int rank = 0; rank < tp; ++rank) {
        const auto plan = plan_parameter(rule, rank, tp);
        const auto parameter = tensors.assembled(plan);
        EXPECT_EQ(std::count(parameter.begin(), parameter.end(), 0), 0) << rule.name << " tp " << tp;
        inverse.add(plan, parameter);
      }
      inverse.expect_equal(tensors, rule.hf[0] + " tp " + std::to_string(tp));
    }
  }
}

TEST(Layouts, ARankHoldsTheRowsOfTheWholeParameterInOrder) {
  // Megatron's sharded checkpoints count on it: grouped rows are split plainly, whatever the number of ranks.
  for (const auto& [rule, sizes] : dense_cases()) {
    const bool grouped = rule.fuse == Fuse::kGroups || (rule.fuse == Fuse::kQkv && rule.heads.groups >= 8);
    if (!grouped) continue;
    Tensors tensors;
    const auto whole = tensors.assembled(plan_parameter(rule, 0, 1));
    for (const int tp : sizes) {
      Values joined;
      for (int rank = 0; rank < tp; ++rank) {
        const auto part = tensors.assembled(plan_parameter(rule, rank, tp));
        joined.insert(joined.end(), part.begin(), part.end());
      }
      EXPECT_EQ(joined, whole) << rule.name << " tp " << tp;
    }
  }
}

TEST(Layouts, QueryRowsAreFollowedByTheirGateRowsWithinEachGroup) {
  Tensors tensors;
  const auto plan = plan_parameter(qkv(Fuse::kQkv, 4, 2, true, 1), 1, 2);
  const auto parameter = tensors.assembled(plan);
  Values expected;  // heads 2 and 3 of q (3 query rows, 3 gate rows each), then k and v of group 1
  for (int row = 12; row < 24; ++row) expected.push_back(tensors.at("q")[row]);
  for (int row = 3; row < 6; ++row) expected.push_back(tensors.at("k")[row]);
  for (int row = 3; row < 6; ++row) expected.push_back(tensors.at("v")[row]);
  EXPECT_EQ(parameter, expected);
}

TEST(Layouts, SplitQkvHoldsQueriesKeysAndValuesOneAfterTheOther) {
  Tensors tensors;
  const auto parameter = tensors.assembled(plan_parameter(joined(qkv(Fuse::kSplitQkv, 4, 4, false, 1)), 1, 2));
  Values expected;  // the file holds [q; k; v] of 12 rows each; rank 1 of 2 has the second half of each
  for (const int part : {0, 1, 2})
    for (int row = 6; row < 12; ++row) expected.push_back(tensors.at("joined")[part * 12 + row]);
  EXPECT_EQ(parameter, expected);
}

TEST(Layouts, GdnIsGroupedPerKeyHead) {
  Tensors tensors;
  const auto parameter = tensors.assembled(plan_parameter(groups({"qkv", "qkv", "qkv", "z", "b", "a"}, kGdn, 1), 0, 1));
  Values expected;
  for (int head = 0; head < 8; ++head) {
    auto take = [&](const char* name, int first, int count) {
      for (int i = 0; i < count; ++i) expected.push_back(tensors.at(name)[first + head * count + i]);
    };
    take("qkv", 0, 2);   // q
    take("qkv", 16, 2);  // k
    take("qkv", 32, 6);  // v: two value heads of width 3
    take("z", 0, 6);
    take("b", 0, 2);
    take("a", 0, 2);
  }
  EXPECT_EQ(parameter, expected);
}

TEST(Layouts, DepthwiseKernelsKeepTheirMiddleDimension) {
  const auto plan = plan_parameter(depthwise(groups({"conv", "conv", "conv"}, {16, 16, 48}, 4)), 1, 4);
  EXPECT_EQ(plan.sizes, (std::vector<int64_t>{20, 1, 4}));
  EXPECT_EQ(plan.tensors[0].sizes(), (std::vector<int64_t>{80, 1, 4}));
}

TEST(Layouts, InterleavedRowsAreSortedIntoGateAndUp) {
  Tensors tensors;
  // Stored [6, 32]: even columns gate, odd columns up.
  const auto plan = plan_parameter(gate_up(Fuse::kInterleaved, {"x", "x"}, true), 1, 4);
  const auto parameter = tensors.assembled(plan);
  ASSERT_EQ(plan.sizes, (std::vector<int64_t>{8, 6}));
  ASSERT_EQ(plan.regions.size(), 1u) << "one contiguous box of the file";
  for (int half = 0; half < 2; ++half) {
    for (int row = 0; row < 4; ++row) {
      for (int col = 0; col < 6; ++col)
        EXPECT_EQ(parameter[(half * 4 + row) * 6 + col], tensors.at("x")[col * 32 + 2 * (4 + row) + half]);
    }
  }
  const auto box = stored_box(plan.tensors[0], plan.regions[0]);
  EXPECT_EQ((std::vector<int64_t>{box.row, box.col, box.rows, box.cols}), (std::vector<int64_t>{0, 8, 6, 8}));
  EXPECT_EQ(stored_columns(plan.tensors[0]), 32);
}

TEST(Layouts, ExpertsOverExpertAndExpertTensorRanks) {
  constexpr int64_t kExperts = 8;
  struct Form {
    Fuse fuse;
    std::vector<std::string> hf;
    bool stacked, transposed;
    Shard shard;
    int64_t cols = 6;
  };
  const std::vector<Form> forms = {
      {Fuse::kGateUp, {"{e}.gate", "{e}.up"}, false, false, Shard::kColumn},
      {Fuse::kNone, {"{e}.down"}, false, false, Shard::kRow, 16},
      {Fuse::kGateUp, {"gate_up", "gate_up"}, true, false, Shard::kColumn},      // [E, 2I, H]
      {Fuse::kGateUp, {"gate_up", "gate_up"}, true, true, Shard::kColumn},       // [E, H, 2I]
      {Fuse::kInterleaved, {"gate_up", "gate_up"}, true, true, Shard::kColumn},  // gpt-oss
      {Fuse::kInterleaved, {"bias", "bias"}, true, true, Shard::kColumn, 0},     // its bias [E, 2I]
      {Fuse::kNone, {"down"}, true, false, Shard::kRow, 16},
      {Fuse::kNone, {"down"}, true, true, Shard::kRow, 16},
      {Fuse::kNone, {"down_bias"}, true, false, Shard::kReplicated, 0},
  };
  for (const auto& form : forms) {
    for (const bool grouped : {false, true}) {
      for (const int ep : {1, 2, 4, 8}) {
        for (const int etp : {1, 2, 4, 8}) {
          Tensors tensors;
          Inverse inverse;
          for (int ep_rank = 0; ep_rank < ep; ++ep_rank) {
            const auto range = local_experts(kExperts, ep_rank, ep);
            for (int etp_rank = 0; etp_rank < etp; ++etp_rank) {
              for (int64_t i = 0; i < (grouped ? 1 : range.count); ++i) {
                const auto count = grouped ? range.count : 1;
                const WeightRule rule{.name = "experts",
                                      .hf = form.hf,
                                      .rows = 16,
                                      .cols = form.cols,
                                      .shard = form.shard,
                                      .fuse = form.fuse,
                                      .experts = {kExperts, range.first + i, count, grouped, form.stacked},
                                      .transposed = form.transposed};
                const auto plan = plan_parameter(rule, {.etp_rank = etp_rank, .etp_size = etp});
                ASSERT_EQ(plan.sizes.size(), (form.cols ? 2u : 1u) + (grouped ? 1u : 0u));
                if (grouped) {
                  ASSERT_EQ(plan.sizes[0], count);
                }
                const auto parameter = tensors.assembled(plan);
                ASSERT_EQ(std::count(parameter.begin(), parameter.end(), 0), 0);
                inverse.add(plan, parameter);
              }
            }
          }
          inverse.expect_equal(tensors, form.hf[0] + " ep " + std::to_string(ep) + " etp " + std::to_string(etp));
        }
      }
    }
  }
}

TEST(Layouts, GroupedExpertsHoldEachExpertsGateAndUp) {
  Tensors tensors;
  const WeightRule rule{.name = "experts",
                        .hf = {"x", "x"},
                        .rows = 8,
                        .cols = 3,
                        .shard = Shard::kColumn,
                        .fuse = Fuse::kGateUp,
                        .experts = {4, 2, 2, true, true},
                        .transposed = true};  // stored [4, 3, 8]
  const auto plan = plan_parameter(rule, {.etp_rank = 1, .etp_size = 2});
  EXPECT_EQ(plan.sizes, (std::vector<int64_t>{2, 4, 3}));
  const auto parameter = tensors.assembled(plan);
  for (int expert = 0; expert < 2; ++expert) {
    for (int row = 0; row < 4; ++row) {
      const int stored_column = row / 2 * 4 + 2 + row % 2;  // gate rows 2, 3, then up rows 2, 3
      for (int col = 0; col < 3; ++col)
        EXPECT_EQ(parameter[(expert * 4 + row) * 3 + col],
                  tensors.at("x")[((expert + 2) * 3 + col) * 8 + stored_column]);
    }
  }
}

TEST(Layouts, ARegionIsCutAlongTheRowsOfTheFile) {
  const std::vector<WeightRule> rules = {plain(48, 7, Shard::kColumn), plain(48, 8, Shard::kRow, true),
                                         gate_up(Fuse::kInterleaved, {"x", "x"}, false),
                                         gate_up(Fuse::kInterleaved, {"x", "x"}, true)};
  for (const auto& rule : rules) {
    Tensors tensors;
    auto plan = plan_parameter(rule, 1, 2);
    const auto expected = tensors.assembled(plan);
    std::vector<Region> cut;
    for (const auto& region : plan.regions) {
      const auto& tensor = plan.tensors[region.tensor];
      const auto box = stored_box(tensor, region);
      for (int64_t row = 0; row < box.rows; row += 2) {
        const auto count = std::min<int64_t>(2, box.rows - row);
        cut.push_back(stored_rows(tensor, region, row, count));
        const auto part = stored_box(tensor, cut.back());
        EXPECT_EQ(part.row, box.row + row);
        EXPECT_EQ(part.rows, count);
        EXPECT_EQ(part.col, box.col);
        EXPECT_EQ(part.cols, box.cols);
      }
    }
    plan.regions = cut;
    EXPECT_EQ(tensors.assembled(plan), expected);
  }
}

TEST(Layouts, RefusesWhatDoesNotFit) {
  EXPECT_THROW(plan_parameter(groups({"b", "a"}, {16, 16}), 0, 3), ValueError);
  EXPECT_THROW(plan_parameter(groups({"b", "a"}, {16, 12}), 0, 2), ValueError);
  EXPECT_THROW(plan_parameter(groups({"b", "a"}, {16, 16, 16}), 0, 2), ValueError);
  EXPECT_THROW(plan_parameter(gate_up(Fuse::kInterleaved, {"a", "b"}, false), 0, 2), ValueError);
  EXPECT_THROW(plan_parameter(gate_up(Fuse::kInterleaved, {"a", "a"}, false), 0, 3), ValueError);
  auto wrong = qkv(Fuse::kQkv, 4, 2, false);
  wrong.rows += 1;
  EXPECT_THROW(plan_parameter(wrong, 0, 1), ValueError);
  EXPECT_THROW(local_experts(8, 0, 3), ValueError);
  WeightRule experts = plain(4, 4, Shard::kColumn);
  experts.experts = {.total = 4, .first = 3, .count = 2, .grouped = true, .stacked = true};
  EXPECT_THROW(plan_parameter(experts, 0, 1), ValueError);
  experts.experts = {.total = 4, .first = 0, .count = 1};
  EXPECT_THROW(plan_parameter(experts, 0, 1), ValueError) << "no {e} in the names";
}

}  // namespace mcore_bridge
