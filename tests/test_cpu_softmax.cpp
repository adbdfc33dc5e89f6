// Log-sum-exp, KL divergence and the largest logit: bounds against double, instruction sets equal.
#include <gtest/gtest.h>

#include <limits>

#include "cpu/softmax.h"
#include "tests/cpu_cases.h"

namespace tq {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

double exact_log_sum_exp(const std::vector<float>& x) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (float value : x) sum += std::exp(value - top);
  return top + std::log(sum);
}

TEST(LogSumExp, IsWithinTwoTenMillionths) {
  for (CpuIsa isa : supported_isas()) {
    for (int64_t count : {1, 5, 16, 17, 1000, 49152}) {
      const std::vector<float> x = random_floats(count, 1, 4.0f);
      // Every term: exp 1.5 ulp = 1.8e-7; the rounded x - max contributes d eps exp(-d) for a
      // distance d, at most 0.37 eps of the largest term. The logarithm passes relative errors on.
      EXPECT_NEAR(log_sum_exp(kernels_for(isa), x), exact_log_sum_exp(x), 2e-7 + 6e-8)
          << isa_name(isa) << " " << count;
    }
  }
}

TEST(LogSumExp, IsStableAndTakesMaskedIdsAsZero) {
  for (CpuIsa isa : supported_isas()) {
    const Kernels& kernels = kernels_for(isa);
    EXPECT_NEAR(log_sum_exp(kernels, std::vector<float>{1000, 1000}), 1000 + std::log(2.0), 1e-12);
    EXPECT_NEAR(log_sum_exp(kernels, std::vector<float>{-1000, -1000}), std::log(2.0) - 1000,
                1e-12);
    EXPECT_NEAR(log_sum_exp(kernels, std::vector<float>{0, kMinusInf, 0, 0, 0}), std::log(4.0),
                1e-12);
  }
}

TEST(KlDivergence, IsWithinAMillionthOfDouble) {
  for (int64_t count : {2, 31, 1000, 49152}) {
    const std::vector<float> p = random_floats(count, 1, 4.0f);
    std::vector<float> q = random_floats(count, 2, 0.3f);
    // Logits also differ by a constant, which a softmax does not see.
    for (size_t i = 0; i < q.size(); ++i) q[i] += p[i] + 2.0f;
    const double p_norm = exact_log_sum_exp(p), q_norm = exact_log_sum_exp(q);
    double exact = 0;
    for (size_t i = 0; i < q.size(); ++i) {
      const double log_p = p[i] - p_norm;
      exact += std::exp(log_p) * (log_p - (q[i] - q_norm));
    }
    for (CpuIsa isa : supported_isas()) {
      // Two log-sum-exps at 2.6e-7; the weighted mean of differences up to 4: its terms carry the
      // same relative errors as the sum they are divided by, so only their spread (0.3) counts.
      EXPECT_NEAR(kl_divergence(kernels_for(isa), p, q), exact, 2 * 2.6e-7 + 4e-7) << count;
    }
  }
}

TEST(KlDivergence, IsExactlyZeroBetweenEqualModels) {
  const std::vector<float> p = random_floats(1000, 1, 4.0f);
  for (CpuIsa isa : supported_isas()) EXPECT_EQ(kl_divergence(kernels_for(isa), p, p), 0.0);
}

TEST(IndexOfMax, IsTheLowestOnTies) {
  for (CpuIsa isa : supported_isas()) {
    std::vector<float> x(100, -3.0f);
    EXPECT_EQ(index_of_max(kernels_for(isa), x), 0);
    x[97] = x[41] = -1.0f;
    EXPECT_EQ(index_of_max(kernels_for(isa), x), 41);
    x[99] = 2.0f;
    EXPECT_EQ(index_of_max(kernels_for(isa), x), 99);
  }
}

TEST(Softmax, InstructionSetsAgreeBitByBit) {
  const Kernels& plain = kernels_for(CpuIsa::kPlain);
  for (int64_t count : {1, 7, 16, 33, 1003, 49152}) {
    const std::vector<float> x = random_floats(count, 1, 5.0f), y = random_floats(count, 2, 5.0f);
    for (CpuIsa isa : supported_isas()) {
      const Kernels& kernels = kernels_for(isa);
      EXPECT_EQ(kernels.max(x.data(), count), plain.max(x.data(), count));
      for (float shift : {0.0f, 7.5f, -60.0f}) {
        EXPECT_EQ(kernels.sum_exp(x.data(), shift, count), plain.sum_exp(x.data(), shift, count));
        EXPECT_EQ(kernels.sum_exp_diff(x.data(), y.data(), shift, count),
                  plain.sum_exp_diff(x.data(), y.data(), shift, count));
      }
    }
  }
}

}  // namespace
}  // namespace tq
