// test_cuda_ops - every operation of the CUDA backend against the CPU's, on odd shapes.
//
// Without a GPU all cases are skipped, and say so; with TQ_REQUIRE_GPU set they fail instead (make
// test-cuda). Outputs are followed by sentinels that must survive. Seeds are printed with a
// failure. Read next: cuda/executor.cpp, which decides what is launched.
#include <gtest/gtest.h>

#include <cstdlib>
#include <limits>
#include <numeric>

#include "cuda/cuda_backend.h"
#include "model/error.h"
#include "model/forward.h"
#include "tests/cpu_cases.h"
#include "tests/tiny_model.h"

namespace tq {
namespace {

constexpr double kEps = 0x1p-24;  // half an ulp of 1 in f32
constexpr float kSentinel = 12345.678f;
constexpr int64_t kGuard = 257;  // floats behind each output
constexpr uint32_t kSeeds[] = {1, 22, 333, 4444, 55555};

class Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    if (cuda_usable(why)) {
      gpu_ = make_cuda_backend();
      return;
    }
    if (std::getenv("TQ_REQUIRE_GPU")) FAIL() << why;
    GTEST_SKIP() << "no GPU: " << why;
  }
  Backend& gpu() { return *gpu_; }
  Backend& cpu() { return cpu_; }

  // A buffer with sentinels behind its `values`.
  static BufferPtr guarded(Backend& backend, std::vector<float> values) {
    values.resize(values.size() + kGuard, kSentinel);
    return to_device(backend, values);
  }
  static BufferPtr guarded(Backend& backend, int64_t count) {
    return guarded(backend, std::vector<float>(static_cast<size_t>(count), kSentinel));
  }
  static std::vector<float> taken(Backend& backend, const DeviceBuffer& buffer, int64_t count) {
    std::vector<float> values = to_host(backend, buffer, count + kGuard);
    for (int64_t i = count; i < count + kGuard; ++i) {
      EXPECT_EQ(values[static_cast<size_t>(i)], kSentinel) << "sentinel " << i - count;
    }
    values.resize(static_cast<size_t>(count));
    return values;
  }

 private:
  std::unique_ptr<Backend> gpu_;
  CpuBackend cpu_{2};
};

double norm(const float* x, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return std::sqrt(sum);
}

double largest(const std::vector<float>& x) {
  double value = 0;
  for (float v : x) value = std::max(value, std::fabs(static_cast<double>(v)));
  return value;
}

// Elements within bound(i) of each other.
template <typename Bound>
void expect_near(const std::vector<float>& got, const std::vector<float>& expected,
                 const Bound& bound) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(static_cast<double>(got[i]) - static_cast<double>(expected[i]));
    if (error <= bound(i)) continue;  // NaN fails
    FAIL() << "element " << i << ": " << got[i] << " instead of " << expected[i] << ", bound "
           << bound(i);
  }
}

TEST_F(Cuda, EmbeddingRowsEqualTheCpus) {
  for (Storage storage :
       {Storage::kF32, Storage::kF16, Storage::kBF16, Storage::kQ4, Storage::kQ8}) {
    const CaseMatrix table(storage, 37, 72, 32, 5);
    const std::vector<int32_t> tokens = {36, 0, 7, 7, 21};
    std::vector<float> results[2];
    for (Backend* backend : {&cpu(), &gpu()}) {
      const auto prepared = backend->prepare_table(table.view);
      const BufferPtr x = guarded(*backend, 5 * 72);
      backend->embed(*prepared, tokens, *x);
      results[backend == &gpu()] = taken(*backend, *x, 5 * 72);
    }
    EXPECT_TRUE(same_numbers(results[1], results[0])) << static_cast<int>(storage);
  }
}

TEST_F(Cuda, RmsNormIsTheCpusToOneUlp) {
  for (uint32_t seed : kSeeds) {
    for (const auto& [rows, cols] :
         {std::pair<int64_t, int64_t>{1, 8}, {3, 577}, {70, 4096}, {5, 14336}, {300, 48}}) {
      SCOPED_TRACE(testing::Message() << "seed " << seed << " " << rows << " x " << cols);
      const std::vector<float> x = random_floats(rows * cols, seed);
      const std::vector<float> gain = random_floats(cols, seed + 1);
      std::vector<float> results[2];
      for (Backend* backend : {&cpu(), &gpu()}) {
        const BufferPtr in = to_device(*backend, x), gains = to_device(*backend, gain);
        const BufferPtr out = guarded(*backend, rows * cols);
        backend->rms_norm(*in, *gains, 1e-5f, rows, cols, *out);
        results[backend == &gpu()] = taken(*backend, *out, rows * cols);
      }
      // The factor may round the other way (an ulp), the products after it follow.
      expect_near(results[1], results[0], [&](size_t i) {
        return 4 * kEps * std::fabs(static_cast<double>(results[0][i]));
      });
    }
  }
}

struct LinearCase {
  std::string name;
  Storage weight = Storage::kQ4;
  int64_t out = 48, in = 128, weight_group = 64;
  ActQuant act = {4, 64, 1.0f, ActCodes::kSymmetric};
  int64_t rank = 0, branch_group = 32;
  Storage branch = Storage::kQ4;
  int64_t block = 0;  // Hadamard
  bool two_level_weights = false;
};

// Every row's scales become multiples of a number of its own.
void make_two_level(CaseMatrix& matrix, uint32_t seed) {
  const int64_t n_groups = matrix.view.n_groups();
  for (size_t i = 0; i < matrix.scales.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / n_groups;
    const uint32_t noise = (static_cast<uint32_t>(i) + seed) * 2654435761u >> 16;
    const float unit = static_cast<float>(64 + row * 37 % 64) * 0x1p-16f;  // 7 bits
    matrix.scales[i] = f32_to_f16(static_cast<float>(1 + noise % kMostMultiple) * unit);
  }
}

// Two-level scales: groups, ends of codes, clips; branches of one and more stages, and of more than
// the kernel takes; weights whose scales are ordinary.
void add_two_level_cases(std::vector<LinearCase>& cases) {
  const auto add = [&](LinearCase c) {
    c.two_level_weights = true;
    c.act.two_level = true;
    cases.push_back(c);
  };
  for (int64_t group : {32, 64, 128}) {
    add({"two-level", Storage::kQ4, 272, 704, group, {4, group, 1.0f, ActCodes::kAll}});
    add({"two-level", Storage::kQ4, 272, 672, group, {3, 64, 0.9f, ActCodes::kSymmetric}});
  }
  add({"two-level, 8 bits", Storage::kQ4, 272, 704, 64, {8, 704, 1.0f, ActCodes::kAll}});
  add({"two-level, 8 bits", Storage::kQ4, 96, 200, 64, {8, 200, 1.0f, ActCodes::kSymmetric}, 32});
  add({"two-level, one group", Storage::kQ4, 96, 200, 200, {4, 200, 1.0f, ActCodes::kAll}});
  for (int64_t rank : {8, 32, 128, 144, 300}) {
    const ActQuant act = {4, 64, 1.0f, ActCodes::kAll};
    add({"two-level branch", Storage::kQ4, 312, 320, 64, act, rank, 64});
  }
  const ActQuant wide = {8, 320, 1.0f, ActCodes::kAll};
  add({"two-level branch, 8 bits", Storage::kQ4, 112, 320, 64, wide, 128, 64});
  LinearCase rotated = {"two-level, Hadamard",        Storage::kQ4, 40, 576, 64,
                        {4, 64, 1.0f, ActCodes::kAll}};
  rotated.block = 576;
  add(rotated);
  cases.push_back(
      {"two-level inputs", Storage::kQ4, 96, 704, 64, {4, 64, 1.0f, ActCodes::kAll, true}, 32, 32});
}

std::vector<LinearCase> linear_cases() {
  std::vector<LinearCase> cases;
  for (Storage storage : {Storage::kF32, Storage::kF16, Storage::kBF16}) {
    cases.push_back({"dense", storage, 70, 136, 0, {16, 64, 1.0f, ActCodes::kSymmetric}});
    cases.push_back(
        {"dense, odd columns", storage, 33, 75, 0, {16, 64, 1.0f, ActCodes::kSymmetric}});
    cases.push_back({"dense, rounded input", storage, 33, 160, 0, {4, 64, 0.9f, ActCodes::kAll}});
  }
  for (Storage storage : {Storage::kQ4, Storage::kQ8}) {
    cases.push_back(
        {"packed, input not rounded", storage, 100, 200, 64, {16, 64, 1.0f, ActCodes::kSymmetric}});
    cases.push_back(
        {"packed, short groups", storage, 21, 56, 8, {8, 32, 1.0f, ActCodes::kSymmetric}});
  }
  for (int bits : {3, 4, 8}) {
    for (ActCodes codes : {ActCodes::kSymmetric, ActCodes::kAll, ActCodes::kAsymmetric}) {
      if (codes == ActCodes::kAsymmetric && bits == 8) continue;
      cases.push_back({"fragments", Storage::kQ4, 96, 576, 64, {bits, 64, 1.0f, codes}});
      cases.push_back({"clip", Storage::kQ4, 50, 300, 64, {bits, 64, 0.9f, codes}});
      cases.push_back({"whole rows", Storage::kQ4, 96, 704, 128, {bits, 704, 1.0f, codes}});
    }
  }
  for (const auto& [w, x] : {std::pair<int64_t, int64_t>{32, 32},
                             {128, 32},
                             {128, 128},
                             {64, 128},
                             {32, 64},
                             {128, 64},
                             {1000, 64},
                             {64, 1000},
                             {1000, 1000}}) {
    cases.push_back({"groups", Storage::kQ4, 272, 704, w, {4, x, 1.0f, ActCodes::kAll}});
  }
  cases.push_back(
      {"one wide", Storage::kQ4, 1000, 2080, 128, {8, 128, 1.0f, ActCodes::kSymmetric}});
  for (int64_t rank : {8, 32, 128, 144}) {
    cases.push_back(
        {"branch", Storage::kQ4, 112, 320, 64, {4, 64, 1.0f, ActCodes::kSymmetric}, rank, 32});
    cases.push_back(
        {"branch", Storage::kQ4, 112, 320, 64, {8, 64, 1.0f, ActCodes::kAll}, rank, 64});
  }
  const ActQuant all = {4, 64, 1.0f, ActCodes::kAll};
  cases.push_back({"16-bit branch", Storage::kQ4, 80, 256, 64, all, 32, 0, Storage::kBF16});
  cases.push_back({"8-bit branch", Storage::kQ4, 80, 256, 64, all, 32, 32, Storage::kQ8});
  cases.push_back(
      {"asymmetric branch", Storage::kQ4, 112, 320, 64, {4, 320, 1.0f, ActCodes::kAsymmetric}, 32});
  cases.push_back(
      {"8-bit weight", Storage::kQ8, 80, 256, 64, {4, 64, 1.0f, ActCodes::kAsymmetric}});
  for (int64_t block : {256, 576, 384, 1536, 2304}) {  // 2^8, 36 2^4, 12 2^5, 12 2^7, 36 2^6
    cases.push_back({"Hadamard",
                     Storage::kQ4,
                     40,
                     block == 256 || block == 1536 ? 2 * block : block,
                     64,
                     {4, 64, 1.0f, ActCodes::kAll},
                     0,
                     32,
                     Storage::kQ4,
                     block});
  }
  cases.push_back({"Hadamard, f32",
                   Storage::kF32,
                   40,
                   172,
                   64,
                   {16, 64, 1.0f, ActCodes::kSymmetric},
                   0,
                   32,
                   Storage::kQ4,
                   172});
  add_two_level_cases(cases);
  return cases;
}

// The same call on both backends; two linears and a third with another rounding share the input.
void compare_linears(Backend& cpu, Backend& gpu, const LinearCase& c, int64_t rows, uint32_t seed) {
  SCOPED_TRACE(testing::Message() << c.name << ", storage " << static_cast<int>(c.weight) << ", "
                                  << c.out << " x " << c.in << ", groups " << c.weight_group << " "
                                  << c.act.group << ", " << c.act.bits << " bits, rank " << c.rank
                                  << ", " << rows << " rows, seed " << seed);
  std::vector<int8_t> signs(static_cast<size_t>(c.in));
  for (size_t i = 0; i < signs.size(); ++i) signs[i] = (i * 2654435761u >> 7 & 1) ? 1 : -1;
  std::vector<CaseMatrix> matrices;
  matrices.reserve(9);
  std::vector<Linear> linears;
  for (int64_t i = 0; i < 3; ++i) {
    Linear linear;
    const int64_t out = c.out + 3 * i;
    matrices.emplace_back(c.weight, out, c.in, c.weight_group, seed + static_cast<uint32_t>(i));
    if (c.two_level_weights) make_two_level(matrices.back(), seed);
    linear.weight = matrices.back().view;
    linear.act = c.act;
    if (i == 2) linear.act.bits = 16;
    if (c.rank > 0 && i != 1) {
      matrices.emplace_back(c.branch, c.rank, c.in, c.weight_group, seed + 10);
      if (c.two_level_weights) make_two_level(matrices.back(), seed);
      linear.branch_a = matrices.back().view;
      matrices.emplace_back(c.branch, out, c.rank, c.branch_group, seed + 11);
      if (c.two_level_weights) make_two_level(matrices.back(), seed);
      linear.branch_b = matrices.back().view;
    }
    if (c.block > 0) {
      linear.input.kind = Transform::Kind::kHadamard;
      linear.input.size = c.in;
      linear.input.block = c.block;
      linear.input.signs = signs.data();
    }
    linears.push_back(linear);
  }
  const std::vector<float> x = random_floats(rows * c.in, seed + 20);
  std::vector<std::vector<float>> results[2];
  for (Backend* backend : {&cpu, &gpu}) {
    std::vector<std::unique_ptr<PreparedLinear>> prepared;
    std::vector<BufferPtr> outs;
    std::vector<const PreparedLinear*> weights;
    std::vector<DeviceBuffer*> out_pointers;
    for (const Linear& linear : linears) {
      prepared.push_back(backend->prepare(linear));
      const std::vector<float> empty(static_cast<size_t>(rows * linear.out_dim() + kGuard),
                                     kSentinel);
      outs.push_back(to_device(*backend, empty));
      weights.push_back(prepared.back().get());
      out_pointers.push_back(outs.back().get());
    }
    const BufferPtr in = to_device(*backend, x);
    backend->linears(weights, *in, rows, out_pointers);
    for (size_t i = 0; i < linears.size(); ++i) {
      results[backend == &gpu].push_back(
          to_host(*backend, *outs[i], rows * linears[i].out_dim() + kGuard));
    }
  }
  for (size_t which = 0; which < linears.size(); ++which) {
    const Linear& linear = linears[which];
    const int64_t out = linear.out_dim();
    std::vector<double> row_norms;
    double a_norm = 0;
    std::vector<float> row(static_cast<size_t>(std::max(c.in, c.rank)));
    for (int64_t i = 0; i < c.rank && linear.branch_a; ++i) {
      matrix_row_f32(*linear.branch_a, i, row.data());
      a_norm = std::hypot(a_norm, norm(row.data(), c.in));
    }
    for (int64_t i = 0; i < out; ++i) {
      matrix_row_f32(linear.weight, i, row.data());
      double total = norm(row.data(), c.in);
      if (linear.branch_b) {
        matrix_row_f32(*linear.branch_b, i, row.data());
        total += a_norm * norm(row.data(), c.rank);
      }
      row_norms.push_back(total);
    }
    // Both sides add at most in + rank products in f32, in different orders: each is within
    // gamma_(in + rank) |x'||w| of the truth. Rounding x to 3 bits or more adds less than half of
    // its norm to x'; the factor 4 covers that, both sides, and the steps of h.
    const double gamma = static_cast<double>(c.in + c.rank) * kEps * 4;
    for (size_t i = static_cast<size_t>(rows * out); i < results[1][which].size(); ++i) {
      ASSERT_EQ(results[1][which][i], kSentinel) << "sentinel";
    }
    results[0][which].resize(static_cast<size_t>(rows * out));
    results[1][which].resize(static_cast<size_t>(rows * out));
    expect_near(results[1][which], results[0][which], [&](size_t i) {
      const int64_t token = static_cast<int64_t>(i) / out;
      return gamma * norm(x.data() + token * c.in, c.in) * row_norms[i % static_cast<size_t>(out)];
    });
  }
}

TEST_F(Cuda, LinearsAgreeWithTheCpu) {
  for (const LinearCase& c : linear_cases()) {
    for (int64_t rows : {1, 2, 7, 8, 9, 16, 17, 65, 150}) {
      compare_linears(cpu(), gpu(), c, rows, kSeeds[rows % 5]);
      if (HasFatalFailure()) return;
    }
  }
}

// Enough tiles that the larger ones are chosen, for the products of all kinds of inputs.
TEST_F(Cuda, ManyTilesAgreeWithTheCpu) {
  for (const ActQuant& act :
       {ActQuant{4, 64, 1.0f, ActCodes::kAll}, ActQuant{8, 64, 1.0f, ActCodes::kAll},
        ActQuant{4, 64, 1.0f, ActCodes::kAll, true},
        ActQuant{8, 320, 1.0f, ActCodes::kAll, true}}) {
    for (int64_t out : {2100, 4100}) {
      LinearCase c = {"many tiles", Storage::kQ4, out, 320, 64, act, 128, 64};
      c.two_level_weights = act.two_level;
      compare_linears(cpu(), gpu(), c, 1000, kSeeds[0]);
      if (HasFatalFailure()) return;
    }
  }
}

// The kernels of older GPUs, where this one has its own.
TEST_F(Cuda, PortableLinearsAgreeWithTheCpu) {
  const std::unique_ptr<Backend> portable = make_cuda_backend(0, true);
  for (const LinearCase& c : linear_cases()) {
    for (int64_t rows : {17, 150}) {
      compare_linears(cpu(), *portable, c, rows, kSeeds[rows % 5]);
      if (HasFatalFailure()) return;
    }
  }
}

// e4m3 sums must be whole numbers to the last bit: all codes and inputs at the end of their range.
TEST_F(Cuda, LargestSumsOfCodesAreExact) {
  for (int64_t group : {64, 128}) {
    for (float sign : {1.0f, -1.0f}) {
      CaseMatrix w(Storage::kQ4, 256, 512, group, 1);
      std::fill(w.data.begin(), w.data.end(), std::byte{0});  // codes -8
      Linear linear;
      linear.weight = w.view;
      linear.act = {4, group, 1.0f, ActCodes::kAll};
      std::vector<float> x(static_cast<size_t>(128 * 512));
      for (size_t i = 0; i < x.size(); ++i) x[i] = i % 512 % 2 ? -8.0f * sign : -7.0f * sign;
      std::vector<float> results[2];
      for (Backend* backend : {&cpu(), &gpu()}) {
        const auto prepared = backend->prepare(linear);
        const PreparedLinear* weights[] = {prepared.get()};
        const BufferPtr in = to_device(*backend, x), out = guarded(*backend, 128 * 256);
        DeviceBuffer* outs[] = {out.get()};
        backend->linears(weights, *in, 128, outs);
        results[backend == &gpu()] = taken(*backend, *out, 128 * 256);
      }
      EXPECT_EQ(results[0], results[1]) << "groups of " << group;
    }
  }
}

TEST_F(Cuda, LargeLinearsAgreeWithTheCpu) {
  LinearCase c = {"large", Storage::kQ4, 520, 1536, 64, {4, 64, 1.0f, ActCodes::kAll}, 64, 64};
  for (int64_t rows : {1, 16, 257, 512}) compare_linears(cpu(), gpu(), c, rows, 77);
  c.weight_group = c.act.group = 128;
  c.branch_group = 128;
  for (int64_t rows : {4, 300}) compare_linears(cpu(), gpu(), c, rows, 78);
}

TEST_F(Cuda, ElementwiseOperationsAgreeWithTheCpu) {
  for (int64_t count : {1, 7, 1000, 70001}) {
    const std::vector<float> a = random_floats(count, 3, 4.0f), b = random_floats(count, 4);
    std::vector<float> sums[2], products[2], copies[2];
    for (Backend* backend : {&cpu(), &gpu()}) {
      const BufferPtr x = guarded(*backend, a), gate = guarded(*backend, a);
      const BufferPtr y = to_device(*backend, b), copy = guarded(*backend, count);
      backend->copy_rows(*x, 0, count, 1, *copy);
      backend->add(*x, *y, count);
      backend->silu_mul(*gate, *y, count);
      sums[backend == &gpu()] = taken(*backend, *x, count);
      products[backend == &gpu()] = taken(*backend, *gate, count);
      copies[backend == &gpu()] = taken(*backend, *copy, count);
    }
    EXPECT_TRUE(same_numbers(sums[1], sums[0]));
    EXPECT_TRUE(same_numbers(copies[1], copies[0]));
    // exp within 1.5 ulp here, 2 ulp there; a sum, a quotient, a product after it.
    expect_near(products[1], products[0], [&](size_t i) {
      return 16 * kEps * std::fabs(static_cast<double>(products[0][i])) + 1e-37;
    });
  }
}

TEST_F(Cuda, TransformsEqualTheCpus) {
  for (const auto& [size, block] : {std::pair<int64_t, int64_t>{2, 2},
                                    {64, 64},
                                    {576, 576},
                                    {96, 32},
                                    {1536, 1536},
                                    {14336, 14336},
                                    {344, 344}}) {
    for (bool inverse : {false, true}) {
      std::vector<int8_t> signs(static_cast<size_t>(size));
      for (size_t i = 0; i < signs.size(); ++i) signs[i] = i % 3 ? 1 : -1;
      Transform transform;
      transform.kind = Transform::Kind::kHadamard;
      transform.size = size;
      transform.block = block;
      transform.signs = signs.data();
      const std::vector<float> x = random_floats(3 * size, 9);
      std::vector<float> results[2];
      for (Backend* backend : {&cpu(), &gpu()}) {
        const auto prepared = backend->prepare_transform(transform);
        const BufferPtr buffer = guarded(*backend, x);
        backend->transform(*buffer, 3, *prepared, inverse);
        results[backend == &gpu()] = taken(*backend, *buffer, 3 * size);
      }
      EXPECT_TRUE(same_numbers(results[1], results[0])) << size << " " << block << " " << inverse;
    }
  }
}

TEST_F(Cuda, DenseTransformsAgreeWithTheCpu) {
  const int64_t size = 72;
  const CaseMatrix matrix(Storage::kBF16, size, size, 0, 4);
  Transform transform;
  transform.kind = Transform::Kind::kDense;
  transform.size = size;
  transform.matrix = matrix.view;
  const std::vector<float> x = random_floats(5 * size, 9);
  for (bool inverse : {false, true}) {
    std::vector<float> results[2];
    for (Backend* backend : {&cpu(), &gpu()}) {
      const auto prepared = backend->prepare_transform(transform);
      const BufferPtr buffer = guarded(*backend, x);
      backend->transform(*buffer, 5, *prepared, inverse);
      results[backend == &gpu()] = taken(*backend, *buffer, 5 * size);
    }
    // |row of M| is below 1 here: 0.05 sqrt(72) is its expectation, 0.42.
    expect_near(results[1], results[0], [&](size_t i) {
      return 4 * static_cast<double>(size) * kEps *
             norm(x.data() + static_cast<int64_t>(i) / size * size, size);
    });
  }
}

Config attention_config(int64_t n_heads, int64_t n_kv_heads, int64_t head_dim) {
  Config config;
  config.n_layers = 2;
  config.n_heads = n_heads;
  config.n_kv_heads = n_kv_heads;
  config.head_dim = head_dim;
  return config;
}

struct AttentionCase {
  int64_t n_heads, n_kv_heads, head_dim;
  int kv_bits;
  std::vector<int64_t> steps = {1, 70, 1, 5, 130, 1, 16, 1};  // rows
};

// A step as long as the cache whose keys and values are NaN.
void fill_with_nan(Backend& backend, const Config& config, KvCache& cache, int64_t ctx) {
  const auto filled = [&](int64_t cols, float value) {
    return to_device(backend, std::vector<float>(static_cast<size_t>(ctx * cols), value));
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const BufferPtr q = filled(config.q_dim(), 1.0f);
  const BufferPtr k = filled(config.kv_dim(), nan), v = filled(config.kv_dim(), nan);
  const BufferPtr out = backend.alloc(ctx * config.q_dim());
  backend.attention(*q, *k, *v, config, cache, 1, 0, ctx, *out);
  to_host(backend, *out, 1);
}

// Rope on q and k, then attention, over steps of several sizes: what a session does. The cache is
// full of NaN when it begins: what stands behind the last key must not matter.
void compare_attention(Backend& cpu, Backend& gpu, const AttentionCase& c, uint32_t seed) {
  SCOPED_TRACE(testing::Message() << c.n_heads << " heads, " << c.n_kv_heads << " of keys, of "
                                  << c.head_dim << ", " << c.kv_bits << " bits, seed " << seed);
  const Config config = attention_config(c.n_heads, c.n_kv_heads, c.head_dim);
  RopeTable rope;
  for (int64_t i = 0; i < c.head_dim / 2; ++i) {
    rope.inv_freq.push_back(
        std::pow(10000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(c.head_dim)));
  }
  const int64_t ctx = std::reduce(c.steps.begin(), c.steps.end()) + 175;
  std::vector<float> results[2];
  std::vector<double> sizes;  // of q, k, v
  for (Backend* backend : {&cpu, &gpu}) {
    const auto cache = backend->make_kv_cache(config, ctx, c.kv_bits);
    int64_t pos = 0;
    fill_with_nan(*backend, config, *cache, ctx);
    for (const int64_t rows : c.steps) {
      const auto data = [&](int64_t heads, uint32_t salt) {
        return random_floats(rows * heads * c.head_dim, seed + static_cast<uint32_t>(pos) + salt);
      };
      const std::vector<float> v = data(c.n_kv_heads, 2000);
      const BufferPtr q = to_device(*backend, data(c.n_heads, 0));
      const BufferPtr k = to_device(*backend, data(c.n_kv_heads, 1000));
      const BufferPtr values = to_device(*backend, v);
      std::vector<float> empty(static_cast<size_t>(rows * config.q_dim() + kGuard), kSentinel);
      const BufferPtr out = to_device(*backend, empty);
      backend->rope(*q, rows, c.n_heads, c.head_dim, pos, rope);
      backend->rope(*k, rows, c.n_kv_heads, c.head_dim, pos, rope);
      backend->attention(*q, *k, *values, config, *cache, 1, pos, rows, *out);
      std::vector<float> got = to_host(*backend, *out, rows * config.q_dim() + kGuard);
      for (int64_t i = rows * config.q_dim(); i < static_cast<int64_t>(got.size()); ++i) {
        ASSERT_EQ(got[static_cast<size_t>(i)], kSentinel);
      }
      got.resize(static_cast<size_t>(rows * config.q_dim()));
      results[backend == &gpu].insert(results[backend == &gpu].end(), got.begin(), got.end());
      pos += rows;
    }
  }
  // A score is off by gamma_head_dim |q||k| / sqrt(head_dim), |q| about sqrt(head_dim) and up to
  // twice that here: 4 head_dim^1.5 eps. A weight is off by twice that and the error of exp, the
  // sums by one eps a key, and values are below 5. Through 16-bit queries and weights (prefill on
  // tensor cores) all of that holds with 2^-11 in place of eps and one rounding in place of a sum.
  const double dim = static_cast<double>(c.head_dim);
  const double exact = (16 * dim * std::sqrt(dim) + static_cast<double>(ctx) + 16) * kEps * 5;
  const double rounded = c.kv_bits < 32 ? (2 * std::sqrt(dim) + 2) * 0x1p-11 : 0.0;
  expect_near(results[1], results[0], [&](size_t) { return exact + rounded; });
}

TEST_F(Cuda, AttentionAgreesWithTheCpu) {
  for (int kv_bits : {32, 16, 8, 4}) {
    for (const auto& [heads, kv_heads, head_dim] : {std::tuple<int64_t, int64_t, int64_t>{4, 4, 8},
                                                    {6, 2, 24},
                                                    {3, 1, 64},
                                                    {8, 2, 128},
                                                    {10, 2, 48},
                                                    {16, 2, 80},
                                                    {16, 16, 128},
                                                    {20, 4, 64},
                                                    {4, 4, 256},
                                                    {9, 1, 16},
                                                    {3, 3, 10},
                                                    {2, 1, 64}}) {
      compare_attention(cpu(), gpu(), {heads, kv_heads, head_dim, kv_bits}, 5);
      if (HasFatalFailure()) return;
    }
  }
}

// More blocks of queries than a GPU has multiprocessors, and many times the keys of a tile.
TEST_F(Cuda, AttentionOfManyRowsAgreesWithTheCpu) {
  const std::vector<int64_t> steps = {1500, 17, 300};
  compare_attention(cpu(), gpu(), {12, 4, 64, 16, steps}, 6);
  compare_attention(cpu(), gpu(), {12, 4, 128, 16, steps}, 7);
  compare_attention(cpu(), gpu(), {2, 2, 128, 16, steps}, 8);
  compare_attention(cpu(), gpu(), {5, 1, 80, 16, steps}, 9);
  for (int kv_bits : {8, 4}) {
    compare_attention(cpu(), gpu(), {12, 4, 64, kv_bits, steps}, 10);
    compare_attention(cpu(), gpu(), {5, 1, 128, kv_bits, steps}, 11);
    compare_attention(cpu(), gpu(), {2, 2, 104, kv_bits, steps}, 12);
  }
}

// Whole numbers: many ties, and the order is exact.
TEST_F(Cuda, TopEqualsTheCpu) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (int64_t n : {1, 5, 2048, 2049, 151936}) {
    for (int64_t count : {1, 2, 20, 50, 1000, 1024, 0}) {
      SCOPED_TRACE(testing::Message() << count << " of " << n);
      std::vector<float> x = random_floats(n, static_cast<uint32_t>(n + count));
      for (float& value : x) value = std::round(value * 1000);  // -0 too
      for (size_t i = 7; i < x.size(); i += 13) x[i] = i % 2 ? -kInf : kInf;
      if (n == 2049) x[2048] = x[5] = std::numeric_limits<float>::quiet_NaN();
      std::vector<Candidate> results[2];
      for (Backend* backend : {&cpu(), &gpu()}) {
        const BufferPtr buffer = to_device(*backend, x);
        backend->top(*buffer, n, count, results[backend == &gpu()]);
      }
      ASSERT_EQ(results[1].size(), results[0].size());
      for (size_t i = 0; i < results[0].size(); ++i) {
        ASSERT_EQ(results[1][i].id, results[0][i].id) << "candidate " << i;
        if (std::isnan(results[0][i].logit)) continue;
        ASSERT_EQ(results[1][i].logit, results[0][i].logit) << "candidate " << i;
      }
    }
  }
}

// Greedy logits of a whole model, token by token: steps repeat, so graphs are captured and
// replayed.
TEST_F(Cuda, SessionsOfRepeatedStepsAgreeWithTheCpu) {
  for (TinyFamily family : {TinyFamily::kLlama, TinyFamily::kQwen3}) {
    for (int kv_bits : {32, 16, 8}) {
      SCOPED_TRACE(testing::Message() << static_cast<int>(family) << " kv " << kv_bits);
      const TinyModel tiny(false, 3, Storage::kF32, family);
      std::vector<std::vector<float>> results[2];
      for (Backend* backend : {&cpu(), &gpu()}) {
        const PreparedModel prepared(tiny.model(), *backend);
        SessionOptions options;
        options.ctx = 400;
        options.kv_bits = kv_bits;
        Session session(prepared, options);
        std::vector<int32_t> ids;
        for (int32_t i = 0; i < 300; ++i) ids.push_back((i * 37 + 11) % 96);
        const auto keep = [&](std::span<const float> logits) {
          results[backend == &gpu()].emplace_back(logits.begin(), logits.end());
        };
        keep(session.feed(std::span(ids).first(5)));
        for (size_t i = 5; i < 30; ++i) keep(session.feed(std::span(ids).subspan(i, 1)));
        session.truncate(10);  // the same graph, back in time
        for (size_t i = 10; i < 20; ++i) keep(session.feed(std::span(ids).subspan(i, 1)));
        keep(session.feed(std::span(ids).subspan(20, 230)));  // past 256 keys soon
        for (size_t i = 250; i < 265; ++i) keep(session.feed(std::span(ids).subspan(i, 1)));
      }
      // Logits through 3 layers of f32 sums, at most 256 terms each; in 8 bits and in 16 a value
      // may round the other way, a step of 2^-8 and of 2^-11, which one head of 12 feels.
      const double bound = kv_bits == 32 ? 1e-4 : kv_bits == 16 ? 2e-3 : 2e-2;
      ASSERT_EQ(results[1].size(), results[0].size());
      for (size_t i = 0; i < results[0].size(); ++i) {
        const double scale = std::max(1.0, largest(results[0][i]));
        SCOPED_TRACE(testing::Message() << "step " << i);
        expect_near(results[1][i], results[0][i], [&](size_t) { return bound * scale; });
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(Cuda, TooMuchMemoryIsRefusedInOneLine) {
  try {
    gpu().alloc(int64_t{1} << 45);
    FAIL() << "allocated 128 TiB";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kResource);
    EXPECT_NE(std::string(error.what()).find("are free"), std::string::npos) << error.what();
  }
  try {
    gpu().make_kv_cache(attention_config(8, 8, 128), int64_t{1} << 40, 16);
    FAIL() << "allocated a cache of a trillion tokens";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kResource);
    EXPECT_NE(std::string(error.what()).find("enough for"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace tq
