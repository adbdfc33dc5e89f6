// Dense linears: double reference with a derived bound, all instruction sets bit-equal, no
// dependence on rows and threads.
#include <gtest/gtest.h>

#include "cpu/matmul.h"
#include "tests/cpu_cases.h"

namespace tq {
namespace {

constexpr Storage kDense[] = {Storage::kF32, Storage::kF16, Storage::kBF16};

TEST(DenseMatmul, IsWithinTheBoundOfADoubleReference) {
  // A partial sum is a chain of ceil(K / 16) fma, then 4 additions: |error| is at most
  // (ceil(K / 16) + 4) eps sum |x w|, eps = 2^-24.
  for (Storage storage : kDense) {
    for (int64_t cols : {1, 15, 16, 17, 172, 576}) {
      const int64_t rows = 23, n = 13;
      CaseMatrix w(storage, rows, cols, 0, 1);
      Linear linear = {};
      linear.weight = w.view;
      const std::vector<float> x = random_floats(n * cols, 2);
      CpuBackend backend(2);
      const std::vector<float> y = run_linear(backend, linear, x, n);
      const double steps = static_cast<double>((cols + 15) / 16 + 4);
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t row = 0; row < rows; ++row) {
          const std::vector<float> values = w.row(row);
          double exact = 0, bound = 0;
          for (int64_t k = 0; k < cols; ++k) {
            const double term = static_cast<double>(values[static_cast<size_t>(k)]) *
                                static_cast<double>(x[static_cast<size_t>(t * cols + k)]);
            exact += term;
            bound += std::fabs(term);
          }
          ASSERT_NEAR(y[static_cast<size_t>(t * rows + row)], exact, steps * 0x1.0p-24 * bound);
        }
      }
    }
  }
}

TEST(DenseMatmul, HandSizedCaseIsExact) {
  // [1 2 3] [4 5 6]^T = 32, [1 2 3] [-1 0 0.5]^T = 0.5
  const float weights[] = {4, 5, 6, -1, 0, 0.5};
  Linear linear = {};
  linear.weight.rows = 2;
  linear.weight.cols = 3;
  linear.weight.data = reinterpret_cast<const std::byte*>(weights);
  for (CpuIsa isa : supported_isas()) {
    CpuBackend backend(1, isa);
    EXPECT_EQ(run_linear(backend, linear, {1, 2, 3}, 1), (std::vector<float>{32, 0.5}));
  }
}

TEST(DenseMatmul, InstructionSetsAgreeBitByBit) {
  for (Storage storage : kDense) {
    for (int64_t cols : {1, 7, 16, 31, 48, 172, 576}) {
      for (int64_t rows : {1, 3, 4, 37}) {
        CaseMatrix w(storage, rows, cols, 0, 3);
        Linear linear = {};
        linear.weight = w.view;
        for (int64_t n : {1, 2, 3, 4, 5, 6, 7, 11, 12, 29}) {
          const std::vector<float> x = random_floats(n * cols, 4);
          CpuBackend plain(1, CpuIsa::kPlain);
          const std::vector<float> expected = run_linear(plain, linear, x, n);
          for (CpuIsa isa : supported_isas()) {
            CpuBackend backend(1, isa);
            ASSERT_TRUE(same_numbers(run_linear(backend, linear, x, n), expected))
                << isa_name(isa) << " " << rows << "x" << cols << " n " << n;
          }
        }
      }
    }
  }
}

TEST(DenseMatmul, DoesNotDependOnRowsOrThreads) {
  const int64_t rows = 203, cols = 172;
  CaseMatrix w(Storage::kBF16, rows, cols, 0, 5);
  Linear linear = {};
  linear.weight = w.view;
  const std::vector<float> x = random_floats(64 * cols, 6);
  CpuBackend backend(1);
  const std::vector<float> all = run_linear(backend, linear, x, 64);
  for (int threads : {1, 2, 3, 7}) {
    CpuBackend other(threads);
    ASSERT_TRUE(same_numbers(run_linear(other, linear, x, 64), all));
    for (int64_t n : {1, 2, 5, 6, 13, 24}) {
      const std::vector<float> part(x.begin() + 3 * cols, x.begin() + (3 + n) * cols);
      const std::vector<float> expected(all.begin() + 3 * rows, all.begin() + (3 + n) * rows);
      ASSERT_TRUE(same_numbers(run_linear(other, linear, part, n), expected)) << n;
    }
  }
}

TEST(DenseMatmul, ReadsUnalignedWeights) {
  // Tensors of a mapped file begin at any multiple of their element size.
  CaseMatrix w(Storage::kBF16, 9, 33, 0, 7);
  std::vector<std::byte> shifted(w.data.size() + 2);
  std::copy(w.data.begin(), w.data.end(), shifted.begin() + 2);
  Linear linear = {}, moved = {};
  linear.weight = moved.weight = w.view;
  moved.weight.data = shifted.data() + 2;
  const std::vector<float> x = random_floats(7 * 33, 8);
  for (CpuIsa isa : supported_isas()) {
    CpuBackend backend(1, isa);
    ASSERT_TRUE(same_numbers(run_linear(backend, moved, x, 7), run_linear(backend, linear, x, 7)));
  }
}

TEST(WorkGrid, CoversEveryOutputOnce) {
  for (int64_t n : {1, 24, 100, 513}) {
    for (int64_t rows : {1, 20, 192, 1000}) {
      for (int threads : {1, 2, 16}) {
        const WorkGrid grid = plan_grid(n, rows, 2304, 2304, 32, threads);
        std::vector<int> count(static_cast<size_t>(n * rows));
        for (int64_t item = 0; item < grid.n_items(); ++item) {
          const WorkGrid::Rectangle area = grid.at(item);
          for (int64_t t = area.token_begin; t < area.token_end; ++t) {
            for (int64_t r = area.row_begin; r < area.row_end; ++r) {
              ++count[static_cast<size_t>(t * rows + r)];
            }
          }
        }
        for (int times : count) ASSERT_EQ(times, 1);
      }
    }
  }
}

}  // namespace
}  // namespace tq
