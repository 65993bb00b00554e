// Vendors' data sheets: dense bfloat16 FLOP/s, memory, bandwidths (one direction), per GPU.
#include "mcore_bridge/error.h"
#include "mcore_bridge/planner.h"

namespace mcore_bridge {

const std::vector<Hardware>& Hardware::table() {
  constexpr double kGiB = 1024.0 * 1024 * 1024;
  // name, usable memory, FLOP/s, memory B/s, link B/s, network B/s
  static const std::vector<Hardware> rows = {
      {"h100", 79.1 * kGiB, 989e12, 3.35e12, 450e9, 50e9},  {"h200", 139.8 * kGiB, 989e12, 4.8e12, 450e9, 50e9},
      {"h800", 79.1 * kGiB, 989e12, 3.35e12, 200e9, 50e9},  {"h20", 95.0 * kGiB, 148e12, 4.0e12, 450e9, 50e9},
      {"b200", 178.0 * kGiB, 2250e12, 8.0e12, 900e9, 50e9}, {"a100", 79.1 * kGiB, 312e12, 2.039e12, 300e9, 25e9},
      {"a800", 79.1 * kGiB, 312e12, 2.039e12, 200e9, 25e9}, {"a100-40g", 39.4 * kGiB, 312e12, 1.555e12, 300e9, 25e9},
      {"l40s", 44.4 * kGiB, 362e12, 0.864e12, 28e9, 25e9},
  };
  return rows;
}

Hardware Hardware::named(const std::string& name) {
  std::string known;
  for (const auto& row : table()) {
    if (row.name == name) return row;
    known += (known.empty() ? "" : ", ") + row.name;
  }
  fail("hardware: '", name, "' is not in the table; known: ", known, " (or give the numbers)");
}

}  // namespace mcore_bridge
