// The fast transform against the explicit matrix, its inverse, and across instruction sets.
#include <gtest/gtest.h>

#include "cpu/hadamard.h"
#include "model/hadamard.h"
#include "tests/cpu_cases.h"

namespace tq {
namespace {

struct Case {
  int64_t size, block;
};
// 24 = 12*2, 20 and 172 have no butterflies, 576 = 36*16, 192 in blocks of 64.
const Case kCases[] = {{1, 1},   {2, 2},     {16, 16},   {64, 64},     {24, 24},  {20, 20},
                       {40, 20}, {172, 172}, {576, 576}, {1536, 1536}, {192, 64}, {512, 512}};

Transform make_transform(const Case& c, const std::vector<int8_t>& signs) {
  Transform transform;
  transform.kind = Transform::Kind::kHadamard;
  transform.size = c.size;
  transform.block = c.block;
  transform.signs = signs.empty() ? nullptr : signs.data();
  return transform;
}
std::vector<int8_t> random_signs(int64_t count) {
  std::mt19937 generator(3);
  std::vector<int8_t> signs(static_cast<size_t>(count));
  for (int8_t& sign : signs) sign = generator() % 2 ? 1 : -1;
  return signs;
}

// Entry of H_m (x) H_2 (x) ... : the base entry, times -1 for every bit that both indices have.
int entry(int64_t block, int64_t i, int64_t j) {
  const int64_t m = hadamard_base_order(block), inner = block / m;
  const int base = m == 1 ? 1 : hadamard_base(m)[static_cast<size_t>(i / inner * m + j / inner)];
  return __builtin_popcountll(static_cast<uint64_t>(i % inner & j % inner)) % 2 ? -base : base;
}

double norm(const float* x, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return std::sqrt(sum);
}

TEST(Hadamard, AgreesWithTheExplicitMatrix) {
  for (const Case& c : kCases) {
    const std::vector<int8_t> signs = random_signs(c.size);
    const FastTransform fast(make_transform(c, signs));
    const std::vector<float> x = random_floats(c.size, 1);
    std::vector<float> y = x;
    fast.apply_row(kernels_for(best_isa()), y.data(), false);
    for (int64_t j = 0; j < c.size; ++j) {
      const int64_t begin = j / c.block * c.block;
      double sum = 0;
      for (int64_t i = begin; i < begin + c.block; ++i) {
        sum += static_cast<double>(x[static_cast<size_t>(i)]) * signs[static_cast<size_t>(i)] *
               entry(c.block, i - begin, j - begin);
      }
      // k + m additions and a rounded scale: (k + m + 2) eps sum |x| / sqrt(block), and
      // sum |x| <= sqrt(block) |x|.
      const double m = static_cast<double>(hadamard_base_order(c.block));
      const double steps = m + std::log2(static_cast<double>(c.block) / m) + 2;
      const double bound = steps * 0x1.0p-24 * norm(x.data() + begin, c.block);
      ASSERT_NEAR(y[static_cast<size_t>(j)], sum / std::sqrt(static_cast<double>(c.block)), bound)
          << c.size << " block " << c.block << " at " << j;
    }
  }
}

TEST(Hadamard, InverseUndoesTheTransform) {
  for (const Case& c : kCases) {
    for (bool with_signs : {false, true}) {
      const std::vector<int8_t> signs = with_signs ? random_signs(c.size) : std::vector<int8_t>{};
      const FastTransform fast(make_transform(c, signs));
      const std::vector<float> x = random_floats(c.size, 2);
      std::vector<float> y = x;
      const Kernels& kernels = kernels_for(best_isa());
      fast.apply_row(kernels, y.data(), false);
      // Orthogonal: each pass adds at most steps * eps * |x| to any element (see above).
      fast.apply_row(kernels, y.data(), true);
      const double m = static_cast<double>(hadamard_base_order(c.block));
      const double steps = m + std::log2(static_cast<double>(c.block) / m) + 2;
      for (int64_t i = 0; i < c.size; ++i) {
        const double bound = 2 * steps * 0x1.0p-24 * norm(x.data(), c.size) *
                             std::sqrt(static_cast<double>(c.block));
        ASSERT_NEAR(y[static_cast<size_t>(i)], x[static_cast<size_t>(i)], bound);
      }
    }
  }
}

TEST(Hadamard, InstructionSetsAgreeBitByBit) {
  for (const Case& c : kCases) {
    const std::vector<int8_t> signs = random_signs(c.size);
    const FastTransform fast(make_transform(c, signs));
    for (bool inverse : {false, true}) {
      std::vector<float> expected = random_floats(c.size, 4);
      const std::vector<float> x = expected;
      fast.apply_row(kernels_for(CpuIsa::kPlain), expected.data(), inverse);
      for (CpuIsa isa : supported_isas()) {
        std::vector<float> y = x;
        fast.apply_row(kernels_for(isa), y.data(), inverse);
        ASSERT_TRUE(same_numbers(y, expected)) << isa_name(isa) << " " << c.size;
      }
    }
  }
}

TEST(Hadamard, BackendTransformsEveryRow) {
  const Case c = {192, 64};
  const std::vector<int8_t> signs = random_signs(c.size);
  const Transform transform = make_transform(c, signs);
  const FastTransform fast(transform);
  const int64_t rows = 50;
  std::vector<float> expected = random_floats(rows * c.size, 5);
  for (int threads : {1, 3}) {
    CpuBackend backend(threads);
    const auto prepared = backend.prepare_transform(transform);
    for (bool inverse : {false, true}) {
      const BufferPtr x = to_device(backend, expected);
      for (int64_t row = 0; row < rows; ++row) {
        fast.apply_row(kernels_for(CpuIsa::kPlain), expected.data() + row * c.size, inverse);
      }
      backend.transform(*x, rows, *prepared, inverse);
      ASSERT_TRUE(same_numbers(to_host(backend, *x, rows * c.size), expected));
    }
  }
}

TEST(DenseTransform, IsTheProductWithTheMatrixAndItsTranspose) {
  for (Storage storage : {Storage::kF32, Storage::kF16, Storage::kBF16}) {
    for (int64_t n : {20, 64, 172}) {
      const CaseMatrix m(storage, n, n, 0, 1);  // a product needs no orthogonality
      Transform transform;
      transform.kind = Transform::Kind::kDense;
      transform.size = n;
      transform.matrix = m.view;
      const int64_t rows = 30;
      const std::vector<float> x = random_floats(rows * n, 2);
      for (bool inverse : {false, true}) {
        CpuBackend plain(1, CpuIsa::kPlain);
        const BufferPtr buffer = to_device(plain, x);
        plain.transform(*buffer, rows, *plain.prepare_transform(transform), inverse);
        const std::vector<float> y = to_host(plain, *buffer, rows * n);
        for (int64_t i = 0; i < n; ++i) {
          double sum = 0, terms = 0;
          for (int64_t k = 0; k < n; ++k) {
            const double term = m.at(inverse ? i : k, inverse ? k : i) *
                                static_cast<double>(x[static_cast<size_t>(n + k)]);
            sum += term;
            terms += std::fabs(term);
          }
          // Row 1: at most n rounded additions of exact products.
          ASSERT_NEAR(y[static_cast<size_t>(n + i)], sum,
                      static_cast<double>(n) * 0x1.0p-24 * terms);
        }
        for (CpuIsa isa : supported_isas()) {
          for (int threads : {1, 3}) {
            CpuBackend backend(threads, isa);
            const auto prepared = backend.prepare_transform(transform);
            const BufferPtr all = to_device(backend, x);
            backend.transform(*all, rows, *prepared, inverse);
            ASSERT_TRUE(same_numbers(to_host(backend, *all, rows * n), y)) << isa_name(isa);
            // One row alone is what it is among others.
            const BufferPtr one = to_device(backend, {x.begin() + n, x.begin() + 2 * n});
            backend.transform(*one, 1, *prepared, inverse);
            ASSERT_TRUE(
                same_numbers(to_host(backend, *one, n), {y.begin() + n, y.begin() + 2 * n}));
          }
        }
      }
    }
  }
}

TEST(Hadamard, LinearTransformsItsInputFirst) {
  const Case c = {96, 96};
  const std::vector<int8_t> signs = random_signs(c.size);
  CaseMatrix w(Storage::kQ4, 40, 96, 32, 1);
  Linear plain = {}, rotated = {};
  plain.weight = rotated.weight = w.view;
  plain.act = rotated.act = {4, 32, 1.0f};
  rotated.input = make_transform(c, signs);
  const FastTransform fast(rotated.input);
  CpuBackend backend(2);
  for (int64_t n : {1, 30}) {
    const std::vector<float> x = random_floats(n * 96, 6);
    std::vector<float> transformed = x;
    for (int64_t t = 0; t < n; ++t) {
      fast.apply_row(kernels_for(CpuIsa::kPlain), transformed.data() + t * 96, false);
    }
    ASSERT_TRUE(same_numbers(run_linear(backend, rotated, x, n),
                             run_linear(backend, plain, transformed, n)));
  }
}

}  // namespace
}  // namespace tq
