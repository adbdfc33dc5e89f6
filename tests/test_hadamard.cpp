// Hadamard base matrices and the choice of orders.
#include <gtest/gtest.h>

#include <bit>
#include <set>

#include "model/hadamard.h"

namespace tq {
namespace {

constexpr int64_t kOrders[] = {1, 12, 20, 28, 36, 60, 68, 76, 100, 108, 140, 148, 156, 172};

class HadamardBase : public ::testing::TestWithParam<int64_t> {};
TEST_P(HadamardBase, RowsAreOrthogonal) {
  const int64_t m = GetParam();
  const std::vector<int8_t>& h = hadamard_base(m);
  ASSERT_EQ(static_cast<int64_t>(h.size()), m * m);
  for (int8_t v : h) ASSERT_EQ(v * v, 1);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      int64_t dot = 0;
      for (int64_t k = 0; k < m; ++k) {
        dot += h[static_cast<size_t>(i * m + k)] * h[static_cast<size_t>(j * m + k)];
      }
      ASSERT_EQ(dot, i == j ? m : 0) << i << " " << j;
    }
  }
}
INSTANTIATE_TEST_SUITE_P(AllOrders, HadamardBase, ::testing::ValuesIn(kOrders));

TEST(HadamardOrder, CoversTheWidthsOfRealModels) {
  const std::pair<int64_t, int64_t> widths[] = {
      {1024, 1},    {2048, 1},    {4096, 1},    {8192, 1},  {2560, 20},  {3072, 12},
      {5120, 20},   {6144, 12},   {12288, 12},  {9728, 76}, {17408, 68}, {25600, 100},
      {14336, 28},  {28672, 28},  {576, 36},    {960, 60},  {1536, 12},  {64, 1},
      {11008, 172}, {13824, 108}, {18944, 148}, {4864, 76}, {8960, 140}, {9984, 156}};
  for (const auto& [width, base] : widths) EXPECT_EQ(hadamard_base_order(width), base) << width;
}

TEST(HadamardOrder, UnbuildableSizesFallBackToTheLargestBlock) {
  EXPECT_EQ(hadamard_base_order(96 * 3), 36);
  EXPECT_EQ(hadamard_base_order(172 * 3), 0);
  EXPECT_EQ(hadamard_block(172 * 3), 172);
  EXPECT_EQ(hadamard_base_order(7), 0);
  EXPECT_EQ(hadamard_block(7), 1);
  EXPECT_EQ(hadamard_block(14), 2);
  EXPECT_EQ(hadamard_block(1536), 1536);
  EXPECT_EQ(hadamard_base_order(0), 0);
}

// 0 < n <= 4096 against the definition: the largest divisor m 2^k with a known m.
TEST(HadamardOrder, BlocksAreTheLargestBuildableDivisors) {
  std::set<int64_t> buildable;
  for (int64_t order : kOrders) {
    for (int64_t n = order; n <= 4096; n *= 2) buildable.insert(n);
  }
  for (int64_t n = 1; n <= 4096; ++n) {
    int64_t best = 0;
    for (int64_t b : buildable) {
      if (n % b == 0) best = b;
    }
    ASSERT_EQ(hadamard_block(n), best) << n;
    const int64_t base = hadamard_base_order(n);
    ASSERT_EQ(base != 0, buildable.count(n) == 1) << n;
    if (base != 0) {
      ASSERT_EQ(n % base, 0) << n;
      ASSERT_TRUE(std::has_single_bit(static_cast<uint64_t>(n / base))) << n;
    }
  }
}

TEST(HadamardOrder, HugeNumbersAreAnsweredAtOnce) {
  EXPECT_EQ(hadamard_base_order(int64_t{1} << 62), 1);
  EXPECT_EQ(hadamard_base_order(INT64_MAX), 0);
  EXPECT_EQ(hadamard_base_order(INT64_MIN), 0);
  EXPECT_EQ(hadamard_base_order(-4), 0);
  EXPECT_EQ(hadamard_block(int64_t{1} << 62), int64_t{1} << 62);
  EXPECT_EQ(hadamard_block(INT64_MAX), 1);
}

}  // namespace
}  // namespace tq
