// Elementwise operations of the CPU backend: exact cases, bounds, instruction sets bit-equal.
#include <gtest/gtest.h>

#include <limits>

#include "cpu/ops.h"
#include "tests/cpu_cases.h"

namespace tq {
namespace {

TEST(Exp, IsWithinOneAndAHalfUlpAndExactAtZero) {
  EXPECT_EQ(exp_f32(0.0f), 1.0f);
  EXPECT_EQ(exp_f32(-0.0f), 1.0f);
  double worst = 0;
  for (float x = -86.0f; x < 88.0f; x += 0.00137f) {
    const double exact = std::exp(static_cast<double>(x));
    const float rounded = static_cast<float>(exact);
    const double ulp =
        static_cast<double>(std::nextafter(rounded, INFINITY)) - static_cast<double>(rounded);
    worst = std::max(worst, std::fabs(static_cast<double>(exp_f32(x)) - exact) / ulp);
  }
  // In halves of a result just below 1: the final sum 0.5 ulp, the fma before it 0.25, the two of
  // the reduction 0.25 each, the polynomial 1e-8 / 2^-24 = 0.17.
  EXPECT_LT(worst, 1.5);
  EXPECT_EQ(exp_f32(-std::numeric_limits<float>::infinity()), 0.0f);
  EXPECT_EQ(exp_f32(-1000.0f), 0.0f);
  EXPECT_TRUE(std::isnan(exp_f32(std::numeric_limits<float>::quiet_NaN())));
  EXPECT_EQ(exp_f32(100.0f), std::numeric_limits<float>::infinity());
}

std::vector<float> awkward_floats(int64_t count) {
  std::vector<float> values = random_floats(count, 1, 5.0f);
  const float special[] = {0.0f, -0.0f, 90.0f, -90.0f, 1e30f, -1e30f, 1e-40f};
  for (size_t i = 0; i < 7 && i < values.size(); ++i) values[i] = special[i];
  return values;
}

TEST(SiluMul, IsWithinTheBoundOfADoubleReference) {
  const std::vector<float> gate = awkward_floats(1003), up = random_floats(1003, 2);
  for (CpuIsa isa : supported_isas()) {
    CpuBackend backend(2, isa);
    const BufferPtr g = to_device(backend, gate), u = to_device(backend, up);
    backend.silu_mul(*g, *u, 1003);
    const std::vector<float> y = to_host(backend, *g, 1003);
    for (size_t i = 0; i < y.size(); ++i) {
      const double x = gate[i];
      const double exact = x / (1 + std::exp(-x)) * static_cast<double>(up[i]);
      // exp within 2 eps, then an addition, a division and a product: 5 eps. Below -88 exp is taken
      // as infinite; the result is then smaller than 1e-36.
      ASSERT_NEAR(y[i], exact, 5 * 0x1.0p-24 * std::fabs(exact) + 1e-36) << gate[i];
    }
  }
}

TEST(Elementwise, InstructionSetsAgreeBitByBit) {
  for (int64_t count : {1, 7, 16, 33, 1003, 40000}) {
    const std::vector<float> a = awkward_floats(count), b = random_floats(count, 3);
    CpuBackend plain(1, CpuIsa::kPlain);
    BufferPtr silu = to_device(plain, a), sum = to_device(plain, a), other = to_device(plain, b);
    plain.silu_mul(*silu, *other, count);
    plain.add(*sum, *other, count);
    for (CpuIsa isa : supported_isas()) {
      CpuBackend backend(3, isa);
      const BufferPtr x = to_device(backend, a), y = to_device(backend, a),
                      z = to_device(backend, b);
      backend.silu_mul(*x, *z, count);
      backend.add(*y, *z, count);
      ASSERT_TRUE(same_numbers(to_host(backend, *x, count), to_host(plain, *silu, count)));
      ASSERT_TRUE(same_numbers(to_host(backend, *y, count), to_host(plain, *sum, count)));
    }
  }
}

TEST(RmsNorm, HandSizedCaseIsExact) {
  // mean(3^2, 4^2, 0, 0) = 6.25, root 2.5
  for (CpuIsa isa : supported_isas()) {
    CpuBackend backend(1, isa);
    const BufferPtr x = to_device(backend, {3, 4, 0, 0, 0, 0, -5, 0});
    const BufferPtr gain = to_device(backend, {1, 2, 3, -1});
    backend.rms_norm(*x, *gain, 0.0f, 2, 4, *x);  // in place
    const std::vector<float> y = to_host(backend, *x, 8);
    EXPECT_FLOAT_EQ(y[0], 1.2f);
    EXPECT_FLOAT_EQ(y[1], 3.2f);
    EXPECT_EQ(y[6], -6.0f);
    EXPECT_EQ(y[7], 0.0f);
  }
}

TEST(RmsNorm, InstructionSetsAgreeAndMeetTheDoubleReference) {
  for (int64_t cols : {1, 5, 64, 172, 576}) {
    const int64_t rows = 31;
    const std::vector<float> x = random_floats(rows * cols, 4), gain = random_floats(cols, 5);
    for (CpuIsa isa : supported_isas()) {
      CpuBackend backend(2, isa);
      const BufferPtr in = to_device(backend, x), g = to_device(backend, gain);
      const BufferPtr out = backend.alloc(rows * cols);
      backend.rms_norm(*in, *g, 1e-5f, rows, cols, *out);
      const std::vector<float> y = to_host(backend, *out, rows * cols);
      for (int64_t row = 0; row < rows; ++row) {
        double sum = 0;
        for (int64_t i = 0; i < cols; ++i) {
          sum += std::pow(static_cast<double>(x[static_cast<size_t>(row * cols + i)]), 2);
        }
        const double root = std::sqrt(sum / static_cast<double>(cols) + static_cast<double>(1e-5f));
        for (int64_t i = 0; i < cols; ++i) {
          const size_t at = static_cast<size_t>(row * cols + i);
          const double exact =
              static_cast<double>(x[at]) / root * static_cast<double>(gain[static_cast<size_t>(i)]);
          // The factor and two products are rounded: 3 eps.
          ASSERT_NEAR(y[at], exact, 3.1 * 0x1.0p-24 * std::fabs(exact));
        }
      }
      if (isa == CpuIsa::kPlain) continue;
      CpuBackend plain(1, CpuIsa::kPlain);
      const BufferPtr pin = to_device(plain, x), pg = to_device(plain, gain);
      plain.rms_norm(*pin, *pg, 1e-5f, rows, cols, *pin);
      ASSERT_TRUE(same_numbers(y, to_host(plain, *pin, rows * cols)));
    }
  }
}

RopeTable rope_table(int64_t head_dim, float factor = 1.0f) {
  RopeTable table;
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    table.inv_freq.push_back(static_cast<float>(
        std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim))));
  }
  table.attention_factor = factor;
  return table;
}

TEST(Rope, IsIdentityAtPositionZero) {
  for (CpuIsa isa : supported_isas()) {
    CpuBackend backend(1, isa);
    const std::vector<float> x = random_floats(3 * 64, 6);
    const BufferPtr buffer = to_device(backend, x);
    backend.rope(*buffer, 1, 3, 64, 0, rope_table(64));
    EXPECT_TRUE(same_numbers(to_host(backend, *buffer, 3 * 64), x));
  }
}

TEST(Rope, TurnsHalfSplitPairsByTheFloatAngleAtFarPositions) {
  for (int64_t head_dim : {2, 10, 64, 80}) {
    for (int64_t pos0 : {1, 100000}) {
      const int64_t rows = 3, heads = 2, half = head_dim / 2;
      const float factor = 1.25f;
      const RopeTable table = rope_table(head_dim, factor);
      const std::vector<float> x = random_floats(rows * heads * head_dim, 7);
      for (CpuIsa isa : supported_isas()) {
        CpuBackend backend(2, isa);
        const BufferPtr buffer = to_device(backend, x);
        backend.rope(*buffer, rows, heads, head_dim, pos0, table);
        const std::vector<float> y = to_host(backend, *buffer, static_cast<int64_t>(x.size()));
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t head = 0; head < heads; ++head) {
            for (int64_t i = 0; i < half; ++i) {
              const size_t at = static_cast<size_t>((row * heads + head) * head_dim + i);
              const size_t partner = at + static_cast<size_t>(half);
              // The angle is the float product; everything after it is compared in double.
              const float angle =
                  static_cast<float>(pos0 + row) * table.inv_freq[static_cast<size_t>(i)];
              const double c = 1.25 * std::cos(static_cast<double>(angle));
              const double s = 1.25 * std::sin(static_cast<double>(angle));
              const double a = x[at], b = x[partner];
              // cos, factor, product, sum are rounded: 4 eps of the terms.
              const double bound = 4 * 0x1.0p-24 * 1.25 * (std::fabs(a) + std::fabs(b));
              ASSERT_NEAR(y[at], a * c - b * s, bound);
              ASSERT_NEAR(y[partner], b * c + a * s, bound);
            }
          }
        }
      }
    }
  }
}

TEST(Rope, AnglesFollowPositionAndTable) {
  // The cache of angles must not survive a change of position, rows, table or factor.
  const std::vector<float> x = random_floats(4 * 8, 8);
  const auto fresh = [&](int64_t rows, int64_t pos0, const RopeTable& table) {
    CpuBackend backend(1);
    const BufferPtr buffer = to_device(backend, x);
    backend.rope(*buffer, rows, 1, 8, pos0, table);
    return to_host(backend, *buffer, 4 * 8);
  };
  CpuBackend backend(1);
  RopeTable other = rope_table(8);
  other.inv_freq[1] *= 2;
  const RopeTable tables[] = {rope_table(8), rope_table(8, 1.5f), other};
  for (int64_t pos0 : {0, 1, 1, 7}) {
    for (int64_t rows : {4, 2}) {
      for (const RopeTable& table : tables) {
        const BufferPtr buffer = to_device(backend, x);
        backend.rope(*buffer, rows, 1, 8, pos0, table);
        ASSERT_TRUE(same_numbers(to_host(backend, *buffer, 4 * 8), fresh(rows, pos0, table)));
      }
    }
  }
}

TEST(Embed, CopiesRowsOfEveryStorage) {
  for (Storage storage :
       {Storage::kF32, Storage::kF16, Storage::kBF16, Storage::kQ4, Storage::kQ8}) {
    for (int64_t cols : {33, 64}) {
      CaseMatrix table(storage, 10, cols, 32, 9);
      for (CpuIsa isa : supported_isas()) {
        CpuBackend backend(2, isa);
        const auto prepared = backend.prepare_table(table.view);
        const std::vector<int32_t> tokens = {9, 0, 3, 3};
        const BufferPtr x = backend.alloc(4 * cols);
        backend.embed(*prepared, tokens, *x);
        const std::vector<float> y = to_host(backend, *x, 4 * cols);
        for (size_t i = 0; i < 4; ++i) {
          const std::vector<float> row(y.begin() + static_cast<long>(i) * cols,
                                       y.begin() + static_cast<long>(i + 1) * cols);
          ASSERT_TRUE(same_numbers(row, table.row(tokens[i])));
        }
      }
    }
  }
}

TEST(CopyRows, CopiesFromTheFirstRowOn) {
  CpuBackend backend(1);
  const BufferPtr from = to_device(backend, {0, 1, 2, 3, 4, 5, 6, 7}), to = backend.alloc(4);
  backend.copy_rows(*from, 1, 2, 2, *to);
  EXPECT_EQ(to_host(backend, *to, 4), (std::vector<float>{2, 3, 4, 5}));
}

TEST(CpuBackend, NamesTheInstructionSetAndTheThreads) {
  EXPECT_EQ(CpuBackend(1, CpuIsa::kPlain).name(), "cpu (plain, 1 thread)");
  EXPECT_EQ(CpuBackend(2, CpuIsa::kPlain).name(), "cpu (plain, 2 threads)");
  EXPECT_GE(CpuBackend().n_threads(), 1);
}

}  // namespace
}  // namespace tq
