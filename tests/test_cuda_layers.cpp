// test_cuda_layers - layers and models on the CUDA backend against the CPU: what calibration sees
// of a layer, results that later operations read, sessions.
//
// Not here: single operations (test_cuda_ops.cpp, test_cuda_linears.cpp). Read next:
// cuda_fixture.h, then cuda/executor.cpp.
#include "model/forward.h"
#include "model/tq_file.h"
#include "quant/calibrate.h"
#include "quant/pipeline.h"
#include "tests/cuda_fixture.h"
#include "tests/temp_dir.h"
#include "tests/tiny_model.h"

namespace tq {
namespace {

double largest(const std::vector<float>& x) {
  double value = 0;
  for (float v : x) value = std::max(value, std::fabs(static_cast<double>(v)));
  return value;
}

// What `tq quantize --device cuda` gathers from: the inputs of every site, and the stream behind
// the last layer, of samples shorter and longer than what one matvec takes.
TEST_F(Cuda, CalibrationSeesWhatItSeesOnTheCpu) {
  for (TinyFamily family : {TinyFamily::kLlama, TinyFamily::kQwen3}) {
    for (int64_t length : {1, 9, 40}) {
      SCOPED_TRACE(testing::Message() << static_cast<int>(family) << ", samples of " << length);
      const TinyModel tiny(false, 5, Storage::kF32, family);
      const Model& model = tiny.model();
      Transform rotation, down;
      rotation.kind = down.kind = Transform::Kind::kHadamard;
      rotation.size = rotation.block = model.config.dim;
      down.size = down.block = model.config.hidden_dim;
      const Calibration calibration = {{random_ids(length, 96, 1), random_ids(length, 96, 2)}};
      std::vector<std::vector<float>> seen[2];
      for (Backend* backend : {&cpu(), &gpu()}) {
        std::vector<std::vector<float>>& mine = seen[backend == &gpu()];
        CalibrationStream stream(model, calibration, rotation, *backend, 1);
        for (Layer layer : model.layers) {
          layer.w_down.input = down;
          std::vector<Site> sites;
          stream.run_layer(
              layer,
              [&](Site site, const float* x, int64_t rows, int64_t cols) {
                sites.push_back(site);
                mine.emplace_back(x, x + rows * cols);
              },
              [] {});
          const std::vector<Site> order = {Site::kAttnIn, Site::kAttnOut, Site::kFfnIn,
                                           Site::kFfnMid};
          EXPECT_TRUE(std::equal(sites.begin(), sites.begin() + 4, order.begin(), order.end()));
          EXPECT_EQ(sites.size(), 8u);
        }
        stream.run_layer(model.layers[0], nullptr, [] {});
        mine.push_back(stream.hidden());
      }
      // Up to four layers of f32 sums, at most 256 terms each, in another order; of more than 4
      // rows every product is also off by 3 * 2^-18 |x||w| (dense_columns.cuh), |x||w| being up to
      // sqrt(256) times an output.
      ASSERT_EQ(seen[1].size(), seen[0].size());
      for (size_t i = 0; i < seen[0].size(); ++i) {
        SCOPED_TRACE(testing::Message() << "tap " << i);
        const double bound = (length > 4 ? 1e-3 : 1e-4) * std::max(1.0, largest(seen[0][i]));
        expect_near(seen[1][i], seen[0][i], [&](size_t) { return bound; });
        if (HasFatalFailure()) return;
      }
    }
  }
}

// A product whose only reader seems to be the residual stream is not written; one that is read once
// more is.
TEST_F(Cuda, ProductsThatAreReadLaterAreKept) {
  const int64_t cols = 320, out = 112;
  const CaseMatrix weight(Storage::kQ4, out, cols, 64, 4), a(Storage::kQ4, 32, cols, 64, 5);
  const CaseMatrix b(Storage::kQ4, out, 32, 32, 6);
  Linear plain, twin;
  plain.weight = twin.weight = weight.view;
  plain.act = twin.act = {4, 64, 1.0f, ActCodes::kAll};
  twin.branch_a = a.view;
  twin.branch_b = b.view;
  for (const Linear& linear : {plain, twin}) {
    for (int64_t rows : {1, 5, 16, 40, 300}) {
      SCOPED_TRACE(testing::Message() << rows << " rows, branch " << (&linear != &plain));
      std::vector<std::vector<float>> results[2];
      for (Backend* backend : {&cpu(), &gpu()}) {
        const auto prepared = backend->prepare(linear);
        const BufferPtr x = to_device(*backend, random_floats(rows * cols, 1));
        const BufferPtr stream = guarded(*backend, random_floats(rows * out, 2));
        const BufferPtr y = guarded(*backend, rows * out), copy = guarded(*backend, rows * out);
        const PreparedLinear* weights[] = {prepared.get()};
        DeviceBuffer* outs[] = {y.get()};
        backend->begin_step(rows);
        backend->linears(weights, *x, rows, outs);
        backend->add(*stream, *y, rows * out);
        backend->copy_rows(*y, 0, rows, out, *copy);
        backend->linears(weights, *x, rows, outs);
        backend->add(*stream, *y, rows * out);
        backend->end_step();
        for (const DeviceBuffer* buffer : {stream.get(), y.get(), copy.get()}) {
          results[backend == &gpu()].push_back(taken(*backend, *buffer, rows * out));
        }
      }
      // As in test_cuda_linears.cpp: |row of W| below 3, |x| below 2 sqrt(cols).
      const double bound = static_cast<double>(cols + 32) * kEps * 8 * 3 * 2 * std::sqrt(cols);
      for (size_t i = 0; i < results[0].size(); ++i) {
        expect_near(results[1][i], results[0][i], [&](size_t) { return bound; });
      }
    }
  }
}

// Rotated q and k that only attention reads may stay inside its kernel; here they are read again.
TEST_F(Cuda, RotatedHeadsThatAreReadLaterAreKept) {
  Config config;
  config.n_layers = 1;
  config.n_heads = 6;
  config.n_kv_heads = 2;
  config.head_dim = 64;
  RopeTable rope;
  for (int i = 0; i < 32; ++i) rope.inv_freq.push_back(std::pow(10000.0f, -i / 32.0f));
  for (int kv_bits : {32, 16, 8}) {
    for (int64_t rows : {1, 7, 40}) {
      SCOPED_TRACE(testing::Message() << kv_bits << " bits, " << rows << " rows");
      std::vector<std::vector<float>> results[2];
      for (Backend* backend : {&cpu(), &gpu()}) {
        const auto cache = backend->make_kv_cache(config, 64, kv_bits);
        const int64_t n_q = rows * config.q_dim(), n_k = rows * config.kv_dim();
        const BufferPtr q = guarded(*backend, random_floats(n_q, 1));
        const BufferPtr k = guarded(*backend, random_floats(n_k, 2));
        const BufferPtr v = to_device(*backend, random_floats(n_k, 3));
        const BufferPtr copy = guarded(*backend, n_q), out = guarded(*backend, n_q);
        backend->begin_step(rows);
        backend->rope(*q, rows, config.n_heads, 64, 5, rope);
        backend->rope(*k, rows, config.n_kv_heads, 64, 5, rope);
        backend->attention(*q, *k, *v, config, *cache, 0, 5, rows, *out);
        backend->copy_rows(*q, 0, rows, config.q_dim(), *copy);
        backend->end_step();
        results[backend == &gpu()] = {taken(*backend, *q, n_q), taken(*backend, *k, n_k),
                                      taken(*backend, *copy, n_q)};
      }
      // An angle is off by an ulp, then two products and their sum of numbers below 5.
      for (size_t i = 0; i < results[0].size(); ++i) {
        expect_near(results[1][i], results[0][i], [&](size_t) { return 16 * 5 * kEps; });
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
      // Logits through 3 layers of f32 sums, at most 256 terms each, and products of bf16 parts
      // (CalibrationSeesWhatItSeesOnTheCpu); in 8 bits and in 16 a value may round the other way, a
      // step of 2^-8 and of 2^-11, which one head of 12 feels.
      const double bound = kv_bits == 32 ? 1e-3 : kv_bits == 16 ? 2e-3 : 2e-2;
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

// A model whose keys, values and outputs of linears are multiplied by powers of two: operations
// between a linear and what is otherwise done together with it.
TEST_F(Cuda, NumbersBeyondF16AgreeWithTheCpu) {
  for (TinyFamily family : {TinyFamily::kLlama, TinyFamily::kQwen3}) {
    for (bool packed : {false, true}) {
      for (int exponent : {20, -24}) {
        TinyModel tiny(false, 3, Storage::kF32, family);
        const auto scaled = [&](size_t linear, int by) {
          for (float& w : tiny.values(2 + linear)) w = std::ldexp(w, by);
        };
        scaled(kWv, exponent);
        scaled(kWo, -exponent);
        if (family == TinyFamily::kLlama) scaled(kWk, exponent), scaled(kWq, -exponent);
        Model model = tiny.model();
        if (family == TinyFamily::kQwen3) {
          for (float& gain : model.layers[1].k_norm) gain = std::ldexp(gain, exponent);
          for (float& gain : model.layers[1].q_norm) gain = std::ldexp(gain, -exponent);
        }
        TempDir folder;
        if (packed) {
          QuantizeOptions options = method_preset("svdquant");
          options.rank = 16;
          quantize_model(model, options, nullptr, 1, cpu(), folder / "m.tq", false, {});
          model = load_tq_file(folder / "m.tq");
        }
        for (int kv_bits : {32, 16, 8}) {
          SCOPED_TRACE(testing::Message() << static_cast<int>(family) << packed << " 2^" << exponent
                                          << " kv " << kv_bits);
          std::vector<std::vector<float>> results[2];
          for (Backend* backend : {&cpu(), &gpu()}) {
            const PreparedModel prepared(model, *backend);
            SessionOptions options;
            options.ctx = 100;
            options.kv_bits = kv_bits;
            Session session(prepared, options);
            const std::vector<int32_t> ids = random_ids(60, 96, 5);
            const auto keep = [&](std::span<const float> logits) {
              results[backend == &gpu()].emplace_back(logits.begin(), logits.end());
            };
            keep(session.feed(std::span(ids).first(40)));  // many rows
            for (size_t i = 40; i < 50; ++i) keep(session.feed(std::span(ids).subspan(i, 1)));
            keep(session.feed(std::span(ids).subspan(50, 4)));
          }
          // As SessionsOfRepeatedStepsAgreeWithTheCpu; rounded inputs may round the other way too,
          // a step of 2^-7 that one of 64 columns feels.
          const double bound = packed || kv_bits == 8 ? 2e-2 : kv_bits == 32 ? 1e-3 : 2e-3;
          ASSERT_EQ(results[1].size(), results[0].size());
          for (size_t i = 0; i < results[0].size(); ++i) {
            const double scale = std::max(1.0, largest(results[0][i]));
            expect_near(results[1][i], results[0][i], [&](size_t) { return bound * scale; });
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace tq
