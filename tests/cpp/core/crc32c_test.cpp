#include "core/crc32c.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

namespace mcore_bridge {

TEST(Crc32c, KnownValues) {
  EXPECT_EQ(crc32c("123456789", 9), 0xE3069283u);  // the check value of the catalogue of CRCs
  EXPECT_EQ(crc32c("", 0), 0u);
  const std::string zeros(32, '\0'), ones(32, '\xff');  // RFC 3720, appendix B.4
  EXPECT_EQ(crc32c(zeros.data(), 32), 0x8A9136AAu);
  EXPECT_EQ(crc32c(ones.data(), 32), 0x62A8AB43u);
}

TEST(Crc32c, PartsInAnyOrderMakeTheWhole) {
  std::mt19937 random(1);
  std::vector<unsigned char> message(10007);
  for (auto& byte : message) byte = static_cast<unsigned char>(random());
  const auto expected = crc32c(message.data(), message.size());
  Crc32cPart first(message.size()), second(message.size());
  size_t at = 0;
  std::vector<std::pair<size_t, size_t>> pieces;
  while (at < message.size()) {
    const auto bytes = std::min<size_t>(message.size() - at, random() % 700 + 1);
    pieces.emplace_back(at, bytes);
    at += bytes;
  }
  std::shuffle(pieces.begin(), pieces.end(), random);
  for (size_t i = 0; i < pieces.size(); ++i)
    (i % 2 ? first : second).add(pieces[i].first, message.data() + pieces[i].first, pieces[i].second);
  first.combine(second.part());
  EXPECT_EQ(first.value(), expected);
  message[77] ^= 1;
  EXPECT_NE(crc32c(message.data(), message.size()), expected);
}

TEST(Crc32c, RowsOfAMatrix) {
  std::vector<unsigned char> matrix(40 * 64 + 5, 0);  // 5 bytes in front, as a header
  Crc32cPart part(matrix.size());
  for (int half = 0; half < 2; ++half) {
    std::vector<unsigned char> columns(40 * 32);
    for (size_t i = 0; i < columns.size(); ++i) columns[i] = static_cast<unsigned char>(i * 7 + half);
    for (size_t row = 0; row < 40; ++row)
      std::copy_n(columns.begin() + row * 32, 32, matrix.begin() + 5 + row * 64 + half * 32);
    part.add_rows(5 + half * 32, 64, 40, 32, columns.data());
  }
  EXPECT_EQ(part.value(), crc32c(matrix.data(), matrix.size()));
}

}  // namespace mcore_bridge
