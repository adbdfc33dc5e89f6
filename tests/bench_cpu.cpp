// bench_cpu - micro-benchmarks of the CPU kernels on the shapes of SmolLM2-135M, via the backend.
//
// Not a test. Arguments: isa (0 plain, 1 AVX2, 2 AVX-512), tokens, rows, columns. Counters: MAC/s
// of products, FLOP/s of attention, bytes of weights or cache a second where memory is the limit.
//   build/bench_cpu --benchmark_filter=Packed --benchmark_repetitions=5
#include <benchmark/benchmark.h>

#include "tests/cpu_cases.h"

namespace tq {
namespace {

bool skip(benchmark::State& state) {
  if (isa_supported(static_cast<CpuIsa>(state.range(0)))) return false;
  state.SkipWithError("instruction set not available");
  return true;
}

void bench_linear(benchmark::State& state, const Linear& linear, int64_t bytes) {
  CpuBackend backend(0, static_cast<CpuIsa>(state.range(0)));
  const int64_t n = state.range(1);
  const auto prepared = backend.prepare(linear);
  const BufferPtr x = to_device(backend, random_floats(n * linear.in_dim(), 1));
  const BufferPtr y = backend.alloc(n * linear.out_dim());
  const PreparedLinear* weights[] = {prepared.get()};
  DeviceBuffer* outputs[] = {y.get()};
  for (auto _ : state) backend.linears(weights, *x, n, outputs);
  const double macs = static_cast<double>(n * linear.in_dim() * linear.out_dim());
  state.counters["MAC/s"] = benchmark::Counter(macs, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["B/s"] =
      benchmark::Counter(static_cast<double>(bytes), benchmark::Counter::kIsIterationInvariantRate);
}

void packed(benchmark::State& state, Storage storage, int act_bits) {
  if (skip(state)) return;
  const CaseMatrix w(storage, state.range(2), state.range(3), 64, 1);
  Linear linear = {};
  linear.weight = w.view;
  linear.act = {act_bits, 64, 1.0f};
  bench_linear(state, linear, static_cast<int64_t>(w.data.size() + 2 * w.scales.size()));
}
void PackedW4A8(benchmark::State& state) {
  packed(state, Storage::kQ4, 8);
}
void PackedW4A4(benchmark::State& state) {
  packed(state, Storage::kQ4, 4);
}
void PackedW8A8(benchmark::State& state) {
  packed(state, Storage::kQ8, 8);
}
void PackedW4A16(benchmark::State& state) {
  packed(state, Storage::kQ4, 16);
}

void dense(benchmark::State& state, Storage storage) {
  if (skip(state)) return;
  const CaseMatrix w(storage, state.range(2), state.range(3), 0, 1);
  Linear linear = {};
  linear.weight = w.view;
  bench_linear(state, linear, static_cast<int64_t>(w.data.size()));
}
void DenseF32(benchmark::State& state) {
  dense(state, Storage::kF32);
}
void DenseBF16(benchmark::State& state) {
  dense(state, Storage::kBF16);
}

// x w^T; arguments as above. CPU time counts, as on one thread.
void Gemm(benchmark::State& state) {
  if (skip(state)) return;
  const int64_t tokens = state.range(1), rows = state.range(2), cols = state.range(3);
  const std::vector<float> x = random_floats(tokens * cols, 1), w = random_floats(rows * cols, 2);
  std::vector<float> y(static_cast<size_t>(tokens * rows));
  const GemmJob job = {x.data(), cols,   1,    w.data(), 1,     cols,   y.data(),
                       rows,     tokens, rows, cols,     false, nullptr};
  const Kernels& kernels = kernels_for(static_cast<CpuIsa>(state.range(0)));
  for (auto _ : state) run_gemms(kernels, 1, {&job, 1});
  state.counters["FLOP/s"] = benchmark::Counter(2.0 * static_cast<double>(tokens * rows * cols),
                                                benchmark::Counter::kIsIterationInvariantRate);
}

void Attention(benchmark::State& state) {
  if (skip(state)) return;
  CpuBackend backend(0, static_cast<CpuIsa>(state.range(0)));
  const int64_t rows = state.range(1), pos0 = state.range(2);
  const int kv_bits = static_cast<int>(state.range(3));
  Config config;
  config.n_layers = 1;
  config.n_heads = 9;
  config.n_kv_heads = 3;
  config.head_dim = 64;
  const auto cache = backend.make_kv_cache(config, pos0 + rows, kv_bits);
  const BufferPtr q = to_device(backend, random_floats(rows * config.q_dim(), 1));
  const BufferPtr k = to_device(backend, random_floats(rows * config.kv_dim(), 2));
  const BufferPtr v = to_device(backend, random_floats(rows * config.kv_dim(), 3));
  const BufferPtr out = backend.alloc(rows * config.q_dim());
  for (auto _ : state) backend.attention(*q, *k, *v, config, *cache, 0, pos0, rows, *out);
  const double pairs =
      static_cast<double>(rows) * (static_cast<double>(pos0) + static_cast<double>(rows + 1) / 2);
  state.counters["FLOP/s"] =
      benchmark::Counter(4.0 * 64 * 9 * pairs, benchmark::Counter::kIsIterationInvariantRate);
}

void SiluMul(benchmark::State& state) {
  if (skip(state)) return;
  CpuBackend backend(0, static_cast<CpuIsa>(state.range(0)));
  const int64_t count = state.range(1);
  const BufferPtr gate = to_device(backend, random_floats(count, 1));
  const BufferPtr up = to_device(backend, random_floats(count, 2, 0.1f));
  for (auto _ : state) backend.silu_mul(*gate, *up, count);
  state.counters["elements/s"] =
      benchmark::Counter(static_cast<double>(count), benchmark::Counter::kIsIterationInvariantRate);
}

void Transform(benchmark::State& state) {
  if (skip(state)) return;
  CpuBackend backend(0, static_cast<CpuIsa>(state.range(0)));
  const int64_t rows = state.range(1), size = state.range(2);
  tq::Transform transform;
  transform.kind = tq::Transform::Kind::kHadamard;
  transform.size = transform.block = size;
  const auto prepared = backend.prepare_transform(transform);
  const BufferPtr x = to_device(backend, random_floats(rows * size, 1));
  for (auto _ : state) backend.transform(*x, rows, *prepared, false);
  state.counters["elements/s"] = benchmark::Counter(static_cast<double>(rows * size),
                                                    benchmark::Counter::kIsIterationInvariantRate);
}

void linear_shapes(benchmark::internal::Benchmark* bench) {
  for (int isa : {1, 2}) {
    for (int64_t n : {512, 1}) {
      for (auto [rows, cols] :
           {std::pair<int64_t, int64_t>{576, 576}, {192, 576}, {1536, 576}, {576, 1536}}) {
        bench->Args({isa, n, rows, cols});
      }
    }
  }
}
void head_shapes(benchmark::internal::Benchmark* bench) {
  for (int isa : {1, 2}) {
    for (int64_t n : {64, 1}) bench->Args({isa, n, 49152, 576});
  }
}
// Larger than the caches: the decode speed of these is a memory bandwidth.
void streaming_shapes(benchmark::internal::Benchmark* bench) {
  for (int isa : {1, 2}) bench->Args({isa, 1, 49152, 2048});
}
void attention_shapes(benchmark::internal::Benchmark* bench) {
  for (int isa : {1, 2}) {
    for (int kv_bits : {32, 16, 8, 4}) {
      for (auto [rows, pos] :
           {std::pair<int64_t, int64_t>{512, 0}, {512, 1536}, {1, 512}, {1, 2047}}) {
        bench->Args({isa, rows, pos, kv_bits});
      }
    }
  }
}

BENCHMARK(PackedW4A8)->Apply(linear_shapes)->Apply(streaming_shapes)->UseRealTime();
BENCHMARK(PackedW4A4)->Apply(linear_shapes)->UseRealTime();
BENCHMARK(PackedW8A8)->Apply(linear_shapes)->UseRealTime();
BENCHMARK(PackedW4A16)->Apply(linear_shapes)->UseRealTime();
BENCHMARK(DenseF32)->Apply(linear_shapes)->UseRealTime();
BENCHMARK(DenseBF16)->Apply(head_shapes)->UseRealTime();
BENCHMARK(Gemm)->Args({1, 512, 1536, 576})->Args({2, 512, 1536, 576})->Args({2, 512, 4096, 4096});
BENCHMARK(Attention)->Apply(attention_shapes)->UseRealTime();
BENCHMARK(SiluMul)->Args({1, 512 * 1536})->Args({2, 512 * 1536})->UseRealTime();
BENCHMARK(Transform)
    ->Args({1, 512, 1536})
    ->Args({2, 512, 1536})
    ->Args({2, 512, 576})
    ->Args({2, 1, 1536})
    ->UseRealTime();

}  // namespace
}  // namespace tq

BENCHMARK_MAIN();
