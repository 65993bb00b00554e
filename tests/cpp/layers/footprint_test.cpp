#include "layers/footprint.h"

#include <gtest/gtest.h>

namespace mcore_bridge {
namespace {

TEST(Footprint, WhatLaterPartsKeptIsGone) {
  Footprint wide{.saved = 10, .workspace = 100};
  wide += {.saved = 30, .workspace = 50};
  EXPECT_EQ(wide.saved, 40);
  EXPECT_EQ(wide.workspace, 70);  // 10 + 100 is the most, 40 + 70
  Footprint last{.saved = 10, .workspace = 100};
  last += {.saved = 30, .workspace = 90};
  EXPECT_EQ(last.workspace, 90);
  last += {.saved = 5};
  EXPECT_EQ(last.workspace, 85);
}

TEST(Footprint, LeavesOutTheLastProductOnly) {
  Footprint first{.forward_flops = 100, .backward_flops = 200, .unread_flops = 40};
  first += {.forward_flops = 10, .backward_flops = 20, .unread_flops = 4};
  first.recompute(0);
  EXPECT_EQ(first.recomputed_flops, 106);
  EXPECT_EQ(first.backward_flops, 326);
  first.recompute(0);  // nothing is left out twice
  EXPECT_EQ(first.recomputed_flops, 216);
}

}  // namespace
}  // namespace mcore_bridge
