// Attention: double reference with a derived bound, independence of chunks, threads and
// instruction set, cache widths and sizes.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "cpu/attention.h"
#include "cpu/exp_constants.h"
#include "model/forward.h"
#include "tests/cpu_cases.h"

namespace tq {
namespace {

Config make_config(int64_t heads, int64_t kv_heads, int64_t head_dim) {
  Config config;
  config.n_heads = heads;
  config.n_kv_heads = kv_heads;
  config.head_dim = head_dim;
  config.n_layers = 2;
  return config;
}

struct Inputs {
  std::vector<float> q, k, v;
  Inputs(const Config& config, int64_t rows)
      : q(random_floats(rows * config.q_dim(), 1)),
        k(random_floats(rows * config.kv_dim(), 2)),
        v(random_floats(rows * config.kv_dim(), 3)) {}
};

// Feeds `rows` tokens in chunks of the given sizes (the last one repeated), layer 1.
std::vector<float> run(CpuBackend& backend, const Config& config, const Inputs& in, int64_t rows,
                       const std::vector<int64_t>& chunks, int kv_bits = 32) {
  const auto cache = backend.make_kv_cache(config, rows, kv_bits);
  std::vector<float> all;
  int64_t pos = 0;
  for (size_t i = 0; pos < rows; ++i) {
    const int64_t n = std::min(chunks[std::min(i, chunks.size() - 1)], rows - pos);
    const auto part = [&](const std::vector<float>& from, int64_t width) {
      return to_device(backend, std::vector<float>(from.begin() + pos * width,
                                                   from.begin() + (pos + n) * width));
    };
    const BufferPtr q = part(in.q, config.q_dim()), k = part(in.k, config.kv_dim()),
                    v = part(in.v, config.kv_dim()), out = backend.alloc(n * config.q_dim());
    backend.attention(*q, *k, *v, config, *cache, 1, pos, n, *out);
    const std::vector<float> y = to_host(backend, *out, n * config.q_dim());
    all.insert(all.end(), y.begin(), y.end());
    pos += n;
  }
  return all;
}

TEST(Attention, IsWithinTheBoundOfADoubleReference) {
  for (int64_t head_dim : {8, 64, 80}) {
    const Config config = make_config(6, 2, head_dim);
    const int64_t rows = 150;
    const Inputs in(config, rows);
    CpuBackend backend(2);
    const std::vector<float> y = run(backend, config, in, rows, {rows});
    for (int64_t row : {0, 1, 63, 64, 65, 149}) {
      for (int64_t head = 0; head < 6; ++head) {
        const float* q = in.q.data() + row * config.q_dim() + head * head_dim;
        std::vector<double> score, magnitude;
        for (int64_t j = 0; j <= row; ++j) {
          const float* k = in.k.data() + j * config.kv_dim() + head / 3 * head_dim;
          double dot = 0, terms = 0;
          for (int64_t i = 0; i < head_dim; ++i) {
            dot += static_cast<double>(q[i]) * static_cast<double>(k[i]);
            terms += std::fabs(static_cast<double>(q[i]) * static_cast<double>(k[i]));
          }
          score.push_back(dot / std::sqrt(static_cast<double>(head_dim)));
          magnitude.push_back(terms / std::sqrt(static_cast<double>(head_dim)));
        }
        const double max = *std::max_element(score.begin(), score.end());
        double sum = 0, worst = 0;
        for (double& s : score) sum += s = std::exp(s - max);
        for (double m : magnitude) worst = std::max(worst, m);
        for (int64_t i = 0; i < head_dim; ++i) {
          double exact = 0, terms = 0;
          for (int64_t j = 0; j <= row; ++j) {
            const double v =
                in.v[static_cast<size_t>(j * config.kv_dim() + head / 3 * head_dim + i)];
            exact += score[static_cast<size_t>(j)] / sum * v;
            terms += score[static_cast<size_t>(j)] / sum * std::fabs(v);
          }
          // A score is off by (head_dim + 1) eps times its terms, which moves exp by as much,
          // numerator and denominator alike (factor 2); the sums add (row + 1) eps each, the exp
          // and the rescaling of a handful of blocks some 16 eps.
          const double eps = 0x1.0p-24;
          const double relative = 2 * (static_cast<double>(head_dim) + 2) * worst * eps +
                                  2 * static_cast<double>(row + 1) * eps + 16 * eps;
          ASSERT_NEAR(y[static_cast<size_t>(row * config.q_dim() + head * head_dim + i)], exact,
                      relative * terms)
              << "head_dim " << head_dim << " row " << row;
        }
      }
    }
  }
}

TEST(Attention, FirstTokenReturnsItsOwnValue) {
  const Config config = make_config(4, 2, 16);
  const Inputs in(config, 1);
  for (CpuIsa isa : supported_isas()) {
    CpuBackend backend(1, isa);
    const std::vector<float> y = run(backend, config, in, 1, {1});
    for (int64_t head = 0; head < 4; ++head) {
      for (int64_t i = 0; i < 16; ++i) {
        EXPECT_EQ(y[static_cast<size_t>(head * 16 + i)],
                  in.v[static_cast<size_t>(head / 2 * 16 + i)]);
      }
    }
  }
}

TEST(Attention, DoesNotDependOnChunks) {
  // 700 positions: two spans, eleven blocks.
  for (const Config& config :
       {make_config(9, 3, 64), make_config(2, 2, 8), make_config(8, 1, 32)}) {
    const int64_t rows = 700;
    const Inputs in(config, rows);
    CpuBackend backend(2);
    for (int kv_bits : {32, 16, 8, 4}) {
      const std::vector<float> whole = run(backend, config, in, rows, {rows}, kv_bits);
      for (const std::vector<int64_t>& chunks :
           {std::vector<int64_t>{512}, {1, 63, 64, 65, 200, 7}, {699, 1}, {510, 1, 2, 90}}) {
        ASSERT_TRUE(same_numbers(run(backend, config, in, rows, chunks, kv_bits), whole));
      }
    }
  }
}

TEST(Attention, DoesNotDependOnThreads) {
  const Config config = make_config(9, 3, 64);
  const int64_t rows = 1100;
  const Inputs in(config, rows);
  for (int kv_bits : {32, 4}) {
    CpuBackend one(1);
    const std::vector<float> expected = run(one, config, in, rows, {1050, 1}, kv_bits);
    for (int threads : {2, 3, 5}) {
      CpuBackend backend(threads);
      ASSERT_TRUE(same_numbers(run(backend, config, in, rows, {1050, 1}, kv_bits), expected));
    }
  }
}

TEST(Attention, InstructionSetsAgreeBitByBit) {
  for (const Config& config : {make_config(9, 3, 64), make_config(4, 4, 8), make_config(7, 1, 80),
                               make_config(2, 1, 128)}) {
    const int64_t rows = 140;
    const Inputs in(config, rows);
    for (int kv_bits : {32, 16, 8, 4}) {
      CpuBackend plain(1, CpuIsa::kPlain);
      const std::vector<float> expected = run(plain, config, in, rows, {100, 1, 39}, kv_bits);
      for (CpuIsa isa : supported_isas()) {
        CpuBackend backend(2, isa);
        ASSERT_TRUE(same_numbers(run(backend, config, in, rows, {100, 1, 39}, kv_bits), expected))
            << isa_name(isa);
      }
    }
  }
}

TEST(Attention, HalfPrecisionCacheRoundsKeysAndValuesOnly) {
  const Config config = make_config(4, 2, 32);
  const int64_t rows = 90;
  Inputs in(config, rows);
  CpuBackend backend(1);
  const std::vector<float> half = run(backend, config, in, rows, {rows}, 16);
  for (float& value : in.k) value = f16_to_f32(f32_to_f16(value));
  for (float& value : in.v) value = f16_to_f32(f32_to_f16(value));
  EXPECT_TRUE(same_numbers(run(backend, config, in, rows, {rows}, 32), half));
}

// x as a cache of codes keeps it, by docs/format.md, written from scratch. Also checks the bound.
void round_like_the_cache(float* x, int64_t count, int bits) {
  const float top = bits == 8 ? 255.0f : 15.0f;
  const auto [low, high] = std::minmax_element(x, x + count);
  const float lowest = *low, highest = *high;
  const float minimum = f16_to_f32(f32_to_f16(lowest));
  const float scale = f16_to_f32(f32_to_f16(std::max(highest - minimum, 0.0f) / top));
  for (int64_t i = 0; i < count; ++i) {
    const float code = scale > 0 ? std::nearbyint((x[i] - minimum) * (1 / scale)) : 0.0f;
    const float value = std::fma(std::clamp(code, 0.0f, top), scale, minimum);
    // Half a step; what f16 does to the minimum and, `top` times, to the scale, relatively and
    // where it is subnormal; a few roundings of f32 (2^-20).
    const float bound = 0.5f * scale +
                        (0x1p-11f + 0x1p-20f) * (std::fabs(lowest) + highest - lowest) +
                        (top + 1) * 0x1p-25f;
    ASSERT_LE(std::fabs(value - x[i]), bound) << bits;
    x[i] = value;
  }
}

TEST(Attention, CodedCacheRoundsKeysAndValuesByTheDocumentedRule) {
  for (const Config& config :
       {make_config(4, 2, 32), make_config(3, 1, 80), make_config(2, 2, 10)}) {
    for (int bits : {8, 4}) {
      const int64_t rows = 90;
      Inputs in(config, rows);
      for (int64_t i = 0; i < config.head_dim; ++i) {  // awkward vectors
        in.k[static_cast<size_t>(i)] = 0.1f;           // all equal
        in.v[static_cast<size_t>(i)] = i == 3 ? -5.0f : 0.0f;
        in.k[static_cast<size_t>(config.kv_dim() + i)] = 1e-7f * static_cast<float>(i);
        in.v[static_cast<size_t>(config.kv_dim() + i)] = 3000.0f + static_cast<float>(i);
      }
      CpuBackend backend(1);
      const std::vector<float> coded = run(backend, config, in, rows, {rows}, bits);
      for (int64_t at = 0; at < rows * config.kv_dim(); at += config.head_dim) {
        round_like_the_cache(in.k.data() + at, config.head_dim, bits);
        round_like_the_cache(in.v.data() + at, config.head_dim, bits);
      }
      EXPECT_TRUE(same_numbers(run(backend, config, in, rows, {rows}, 32), coded)) << bits;
    }
  }
}

TEST(Attention, ARewrittenPositionForgetsItsOldCodes) {
  // A timeline that is cut back and continued: nibbles share bytes.
  const Config config = make_config(2, 1, 16);
  const int64_t rows = 80;
  const Inputs in(config, rows);
  Inputs other = in;
  std::reverse(other.k.begin(), other.k.end());
  std::reverse(other.v.begin(), other.v.end());
  for (int bits : {8, 4}) {
    CpuBackend backend(1);
    const auto cache = backend.make_kv_cache(config, rows, bits);
    const auto feed = [&](const Inputs& from, int64_t pos, int64_t n) {
      const auto part = [&](const std::vector<float>& values, int64_t width) {
        return to_device(backend,
                         {values.begin() + pos * width, values.begin() + (pos + n) * width});
      };
      const BufferPtr q = part(from.q, config.q_dim()), k = part(from.k, config.kv_dim()),
                      v = part(from.v, config.kv_dim()), out = backend.alloc(n * config.q_dim());
      backend.attention(*q, *k, *v, config, *cache, 1, pos, n, *out);
      return to_host(backend, *out, n * config.q_dim());
    };
    feed(in, 0, 50);
    feed(other, 50, 30);
    std::vector<float> expected = run(backend, config, in, rows, {rows}, bits);
    expected.erase(expected.begin(), expected.begin() + 50 * config.q_dim());
    EXPECT_TRUE(same_numbers(feed(in, 50, 30), expected)) << bits;
  }
}

TEST(Attention, NanAndInfinityReachTheOutputOfACodedCache) {
  const Config config = make_config(2, 1, 16);
  for (float value : {std::numeric_limits<float>::quiet_NaN(), kInfinity}) {
    for (bool in_key : {false, true}) {
      Inputs in(config, 3);
      (in_key ? in.k : in.v)[17] = value;  // of position 1
      for (CpuIsa isa : supported_isas()) {
        CpuBackend backend(1, isa);
        const std::vector<float> y = run(backend, config, in, 3, {3}, 4);
        for (size_t i = 0; i < 3 * 32; ++i) EXPECT_EQ(std::isnan(y[i]), i >= 32) << i;
      }
    }
  }
}

TEST(Attention, LaterTokensAndLeftoversDoNotReachEarlierQueries) {
  // A value behind a query's position weighs nothing even if it is infinite.
  const Config config = make_config(2, 1, 16);
  const int64_t rows = 20;
  Inputs in(config, rows);
  for (CpuIsa isa : supported_isas()) {
    CpuBackend backend(1, isa);
    for (int kv_bits : {32, 4}) {
      const std::vector<float> expected = run(backend, config, in, 10, {10}, kv_bits);
      Inputs poisoned = in;
      for (int64_t i = 10 * 16; i < rows * 16; ++i) {
        poisoned.k[static_cast<size_t>(i)] = std::numeric_limits<float>::quiet_NaN();
        poisoned.v[static_cast<size_t>(i)] = std::numeric_limits<float>::infinity();
      }
      std::vector<float> y = run(backend, config, poisoned, rows, {rows}, kv_bits);
      y.resize(static_cast<size_t>(10 * config.q_dim()));
      EXPECT_TRUE(same_numbers(y, expected)) << isa_name(isa);
    }
  }
}

TEST(KvCache, BytesAreWhatTheCacheTakes) {
  const Config config = make_config(9, 3, 64);
  CpuBackend backend(1);
  // 2 layers, 3 heads, keys and values of 64, 1024 positions
  EXPECT_EQ(backend.kv_bytes(config, 1024, 32), 2 * 3 * 2 * 64 * 1024 * 4);
  EXPECT_EQ(backend.kv_bytes(config, 1024, 16), 2 * 3 * 2 * 64 * 1024 * 2);
  EXPECT_EQ(backend.kv_bytes(config, 1, 32), 2 * 3 * 2 * 64 * 64 * 4);  // whole blocks
  // Scale and minimum: 4 bytes a vector, so 8.5 and 4.5 bits a value.
  EXPECT_EQ(backend.kv_bytes(config, 1024, 8), 2 * 3 * 2 * 1024 * (64 + 4));
  EXPECT_EQ(backend.kv_bytes(config, 1024, 4), 2 * 3 * 2 * 1024 * (32 + 4));
  for (int bits : {32, 16, 8, 4}) {
    EXPECT_EQ(backend.kv_bytes(config, 1024, bits), 1024 * kv_token_bytes(config, bits)) << bits;
  }
}

TEST(KvCache, RefusesWidthsItDoesNotHave) {
  const Config config = make_config(2, 1, 16);
  CpuBackend backend(1);
  for (int bits : {2, 5, 12, 0, 64, -8}) {
    try {
      backend.make_kv_cache(config, 16, bits);
      FAIL() << bits;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kUsage);
    }
  }
}

TEST(KvCache, TooLongAContextIsAnErrorThatSaysHowMuchItNeeds) {
  Config config = make_config(64, 64, 128);
  config.n_layers = 100;
  CpuBackend backend(1);
  for (int64_t ctx : {int64_t{1} << 24, int64_t{1} << 60}) {
    try {
      backend.make_kv_cache(config, ctx, 16);
      FAIL();
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kResource);
      EXPECT_NE(std::string(error.what()).find("--ctx"), std::string::npos) << error.what();
    }
  }
}

}  // namespace
}  // namespace tq
