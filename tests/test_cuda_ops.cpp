// test_cuda_ops - the operations of the CUDA backend against the CPU's, on odd shapes.
//
// Not here: linears (test_cuda_linears.cpp), layers and models (test_cuda_layers.cpp). Read next:
// cuda_fixture.h, then cuda/executor.cpp, which decides what is launched.
#include <limits>
#include <numeric>

#include "model/error.h"
#include "model/hadamard.h"
#include "tests/cuda_fixture.h"

namespace tq {
namespace {

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
    for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 8},
                                     {3, 577},
                                     {70, 4096},
                                     {5, 14336},
                                     {300, 48},
                                     {20, 14340}}) {
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

TEST_F(Cuda, ScaledColumnsEqualTheCpus) {
  for (const auto& [rows, cols] :
       {std::pair<int64_t, int64_t>{1, 1}, {1, 576}, {7, 130}, {300, 96}}) {
    std::vector<float> factors(static_cast<size_t>(cols));
    for (size_t i = 0; i < factors.size(); ++i) {
      factors[i] = std::ldexp(1.0f, static_cast<int>(i % 61) - 30);
    }
    std::vector<float> results[2];
    for (Backend* backend : {&cpu(), &gpu()}) {
      const BufferPtr x = guarded(*backend, random_floats(rows * cols, 9));
      const BufferPtr by = to_device(*backend, factors);
      backend->scale_columns(*x, rows, cols, *by);
      results[backend == &gpu()] = taken(*backend, *x, rows * cols);
    }
    EXPECT_TRUE(same_numbers(results[1], results[0]));
  }
}

// Orders 1, 12, 20, 28, 36 and others; few rows and many have kernels of their own.
TEST_F(Cuda, TransformsEqualTheCpus) {
  for (const auto& [size, block] : {std::pair<int64_t, int64_t>{2, 2},
                                    {64, 64},
                                    {576, 576},
                                    {96, 32},
                                    {384, 128},
                                    {8192, 8192},
                                    {1536, 1536},
                                    {12288, 6144},
                                    {1280, 640},
                                    {2304, 2304},
                                    {9728, 9728},
                                    {14336, 14336},
                                    {344, 344}}) {
    for (const auto& [rows, inverse] : {std::pair{3, false}, {3, true}, {20, false}, {20, true}}) {
      std::vector<int8_t> signs(static_cast<size_t>(size));
      for (size_t i = 0; i < signs.size(); ++i) signs[i] = i % 3 ? 1 : -1;
      Transform transform;
      transform.kind = Transform::Kind::kHadamard;
      transform.size = size;
      transform.block = block;
      transform.signs = signs.data();
      const std::vector<float> x = random_floats(rows * size, 9);
      std::vector<float> results[2];
      for (Backend* backend : {&cpu(), &gpu()}) {
        const auto prepared = backend->prepare_transform(transform);
        const BufferPtr buffer = guarded(*backend, x);
        backend->transform(*buffer, rows, *prepared, inverse);
        results[backend == &gpu()] = taken(*backend, *buffer, rows * size);
      }
      EXPECT_TRUE(same_numbers(results[1], results[0]))
          << size << " " << block << " " << rows << " rows " << inverse;
    }
  }
}

// Sums, norms and SwiGLU are done by the kernel that rounds the input of a linear. Their results
// are written where a later operation reads them, and only there.
TEST_F(Cuda, ResultsThatAreReadLaterAreKept) {
  const int64_t cols = 3072, out = 48;
  const CaseMatrix matrix(Storage::kQ4, out, cols, 64, 4);
  Linear plain, rotated;
  plain.weight = rotated.weight = matrix.view;
  plain.act = rotated.act = {4, 64, 1.0f, ActCodes::kAll};
  rotated.input.kind = Transform::Kind::kHadamard;
  rotated.input.size = rotated.input.block = cols;
  for (const Linear& linear : {plain, rotated}) {
    for (int64_t rows : {3, 40, 300}) {
      SCOPED_TRACE(testing::Message() << rows << " rows, " << linear.input.block);
      const std::vector<float> x = random_floats(rows * cols, 1), y = random_floats(rows * cols, 2);
      const std::vector<float> gain = random_floats(cols, 3);
      std::vector<float> results[2];
      for (Backend* backend : {&cpu(), &gpu()}) {
        const auto prepared = backend->prepare(linear);
        const auto run = [&](const DeviceBuffer& from, DeviceBuffer& to) {
          const PreparedLinear* weights[] = {prepared.get()};
          DeviceBuffer* outs[] = {&to};
          backend->linears(weights, from, rows, outs);
        };
        const BufferPtr stream = to_device(*backend, x), up = to_device(*backend, y);
        const BufferPtr gains = to_device(*backend, gain);
        const BufferPtr normed = backend->alloc(rows * cols), again = to_device(*backend, y);
        const BufferPtr products[] = {backend->alloc(rows * out), backend->alloc(rows * out),
                                      backend->alloc(rows * out), backend->alloc(rows * out)};
        backend->begin_step(rows);
        backend->add(*stream, *up, rows * cols);
        backend->rms_norm(*stream, *gains, 1e-5f, rows, cols, *normed);
        run(*normed, *products[0]);
        backend->copy_rows(*normed, 1, rows - 1, cols, *again);
        backend->rms_norm(*up, *gains, 1e-5f, rows, cols, *normed);  // read by the linear only
        run(*normed, *products[1]);
        backend->rms_norm(*again, *gains, 1e-5f, rows, cols, *normed);
        run(*normed, *products[2]);
        backend->silu_mul(*up, *stream, rows * cols);
        run(*up, *products[3]);
        backend->end_step();
        std::vector<float>& all = results[backend == &gpu()];
        for (const DeviceBuffer* buffer : {stream.get(), normed.get(), up.get()}) {
          const std::vector<float> values = to_host(*backend, *buffer, rows * cols);
          all.insert(all.end(), values.begin(), values.end());
        }
        for (const BufferPtr& buffer : products) {
          const std::vector<float> values = to_host(*backend, *buffer, rows * out);
          all.insert(all.end(), values.begin(), values.end());
        }
      }
      // Norms and SwiGLU to 16 ulps of numbers below 2^4; the products sum `cols` numbers of that
      // size, whose codes are the same.
      expect_near(results[1], results[0], [&](size_t i) {
        const bool product = i >= static_cast<size_t>(3 * rows * cols);
        return (product ? 16.0 * cols : 16 * 16.0) * kEps * 2;
      });
    }
  }
}

// Divided in another way than alone, to the same bits, by numbers of all sizes.
TEST_F(Cuda, SwigluIsTheSameBeforeALinear) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const int64_t rows = 40, cols = 3072, out = 16;
  const CaseMatrix matrix(Storage::kQ4, out, cols, 64, 4);
  Linear linear;
  linear.weight = matrix.view;
  linear.act = {4, 64, 1.0f, ActCodes::kAll};
  std::vector<float> x = random_floats(rows * cols, 1, 20.0f);
  const std::vector<float> y = random_floats(rows * cols, 2);
  const float special[] = {0.0f,
                           -0.0f,
                           1e-42f,
                           -1e-42f,
                           1e-19f,
                           -1e-19f,
                           63.9f,
                           -63.9f,
                           64.1f,
                           -88.0f,
                           -89.0f,
                           -104.0f,
                           1e30f,
                           -1e30f,
                           kInf,
                           -kInf,
                           std::numeric_limits<float>::quiet_NaN()};
  for (size_t i = 0; i < 1000; ++i) x[i * 37] = special[i % std::size(special)];
  const auto prepared = gpu().prepare(linear);
  const BufferPtr alone = to_device(gpu(), x), fused = to_device(gpu(), x),
                  up = to_device(gpu(), y);
  gpu().silu_mul(*alone, *up, rows * cols);
  const std::vector<float> expected = to_host(gpu(), *alone, rows * cols);
  const BufferPtr product = gpu().alloc(rows * out);
  const PreparedLinear* weights[] = {prepared.get()};
  DeviceBuffer* outs[] = {product.get()};
  gpu().begin_step(rows);
  gpu().silu_mul(*fused, *up, rows * cols);
  gpu().linears(weights, *fused, rows, outs);
  gpu().end_step();
  EXPECT_TRUE(same_numbers(to_host(gpu(), *fused, rows * cols), expected));
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
  bool prepared = false;  // norms of heads before the rotation, a Hadamard matrix after it
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
    Transform basis;
    basis.kind = Transform::Kind::kHadamard;
    basis.size = c.head_dim;
    basis.block = hadamard_block(c.head_dim);
    const auto hadamard = backend->prepare_transform(basis);
    const BufferPtr gain = to_device(*backend, random_floats(c.head_dim, seed + 3000));
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
      for (const auto& [heads, n] : {std::pair{q.get(), c.n_heads}, {k.get(), c.n_kv_heads}}) {
        if (c.prepared) backend->rms_norm(*heads, *gain, 1e-5f, rows * n, c.head_dim, *heads);
        backend->rope(*heads, rows, n, c.head_dim, pos, rope);
        if (c.prepared) backend->transform(*heads, rows * n, *hadamard, false);
      }
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

TEST_F(Cuda, NormedAndRotatedHeadsAgreeWithTheCpu) {
  for (int kv_bits : {32, 16, 8, 4}) {
    for (int64_t head_dim : {16, 64, 128, 256}) {
      AttentionCase c = {6, 3, head_dim, kv_bits};
      c.prepared = true;
      compare_attention(cpu(), gpu(), c, 13);
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
  for (int kv_bits : {32, 8, 4}) {
    compare_attention(cpu(), gpu(), {12, 4, 64, kv_bits, steps}, 10);
    compare_attention(cpu(), gpu(), {5, 1, 128, kv_bits, steps}, 11);
    compare_attention(cpu(), gpu(), {2, 2, 104, kv_bits, steps}, 12);
  }
}

// Numbers that only their last bits tell apart: many rows multiply floats as two parts of 16 bits.
TEST_F(Cuda, AttentionOfFloatsKeepsTheirLastBits) {
  const int64_t rows = 90;
  // Scores q.k / 8 tell keys apart by the last bits of q and k (both exact in f32, as are their
  // products), or weights and values need theirs. A score is off by less than |q||k| 2^-22 / 8,
  // a sum by 2^-21 of the largest value; without one of the parts either is off by 0.02 of it.
  for (const bool wide_scores : {true, false}) {
    for (const int64_t dim : {64, 128}) {
      SCOPED_TRACE(testing::Message() << "scores " << wide_scores << ", head_dim " << dim);
      const Config config = attention_config(1, 1, dim);
      std::vector<float> q(static_cast<size_t>(rows * dim)), k = q, v = q;
      for (int64_t row = 0; row < rows; ++row) {
        const auto at = static_cast<size_t>(row * dim);
        const auto number = [](int64_t n) { return static_cast<float>(n); };
        q[at] = 1.0f + (wide_scores ? number(row % 3) * 0x1p-11f : 0.0f);
        q[at + 1] = -1.0f;
        k[at + 1] = wide_scores ? number(1024 * (row % 5)) : 0.0f;
        k[at] = k[at + 1] + number(row % 7);
        for (int64_t i = 0; i < dim; ++i) {
          const float size = wide_scores ? 1.0f : 1000.0f + number(row + i) / 64;
          v[at + static_cast<size_t>(i)] = row % 2 ? -size : size;
        }
      }
      std::vector<float> results[2];
      for (Backend* backend : {&cpu(), &gpu()}) {
        const auto cache = backend->make_kv_cache(config, rows, 32);
        const BufferPtr out = backend->alloc(rows * dim);
        backend->attention(*to_device(*backend, q), *to_device(*backend, k),
                           *to_device(*backend, v), config, *cache, 1, 0, rows, *out);
        results[backend == &gpu()] = to_host(*backend, *out, rows * dim);
      }
      const double bound = wide_scores ? 1e-3 : 5e-3;
      expect_near(results[1], results[0], [&](size_t) { return bound; });
    }
  }
}

// One key with nearly all of the weight, and many whose small weights count together: e^-12.5
// is 62.5 times the smallest f16, so that weights taken as they are would be off by 0.0075 of
// themselves. Both sides add up to 2100 equal numbers in f32: 2100 eps of the sum, 7.8.
TEST_F(Cuda, AttentionOfFloatsKeepsSmallWeights) {
  const int64_t rows = 2100, dim = 64;
  const Config config = attention_config(1, 1, dim);
  std::vector<float> q(static_cast<size_t>(rows * dim)), k = q, v(q.size(), 1000.0f);
  for (int64_t row = 0; row < rows; ++row) q[static_cast<size_t>(row * dim)] = 1.0f;
  k[0] = 100.0f;
  std::fill(v.begin(), v.begin() + dim, 0.0f);
  std::vector<float> results[2];
  for (Backend* backend : {&cpu(), &gpu()}) {
    const auto cache = backend->make_kv_cache(config, rows, 32);
    const BufferPtr out = backend->alloc(rows * dim);
    backend->attention(*to_device(*backend, q), *to_device(*backend, k), *to_device(*backend, v),
                       config, *cache, 1, 0, rows, *out);
    results[backend == &gpu()] = to_host(*backend, *out, rows * dim);
  }
  expect_near(results[1], results[0], [&](size_t) { return 2e-3; });
}

// One row after many: stretches that the largest clusters share, and more than those take.
TEST_F(Cuda, AttentionAfterManyKeysAgreesWithTheCpu) {
  for (int64_t head_dim : {64, 128}) {
    compare_attention(cpu(), gpu(), {4, 2, head_dim, 16, {1100, 1, 3, 1}}, 14);
    compare_attention(cpu(), gpu(), {4, 4, head_dim, 16, {1100, 1, 3, 1}}, 15);
    compare_attention(cpu(), gpu(), {3, 1, head_dim, 16, {4300, 1, 2}}, 16);
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
        ASSERT_EQ(std::isfinite(results[1][i].logit), std::isfinite(results[0][i].logit));
        if (!std::isfinite(results[0][i].logit)) continue;
        ASSERT_EQ(results[1][i].logit, results[0][i].logit) << "candidate " << i;
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
