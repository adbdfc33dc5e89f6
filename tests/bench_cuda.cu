// bench_cuda - the kernels of the CUDA backend one by one, over the matrices of an 8B model.
//
// Each figure is the median of many batches; a batch runs over as many copies of the weights as it
// takes to leave the second-level cache behind, so that each run reads its weights from memory.
// Data are random. Beside every product stands cuBLASLt's of the same shape (bench_cublas.h), the
// fastest of the ways that it offers. Usage: bench_cuda [PART] [--json FILE]; parts are matvec,
// gemm, dense, rows and attention. Not here: whole models (tq bench).
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "model/error.h"
#include "model/hadamard.h"
#include "model/json.h"
#include "tests/bench_cublas.h"

namespace tq::cuda {
namespace {

constexpr int kBatches = 15;

struct Bench {
  Gpu gpu;
  double bandwidth;
  std::mt19937 generator{1};
  Json records = Json::array();

  Bench() {
    gpu.facts = open_device(0);
    cuda_check(cudaStreamCreate(&gpu.stream), "stream");
    bandwidth = measure_read_bandwidth(gpu);
  }

  /// Median time of one of `n` runs, microseconds: replayed as a graph, as a decode step is, so
  /// that launching costs the GPU's time and not the CPU's.
  double time(int n, const std::function<void(int)>& run) const {
    run(0);  // loads the kernel, which a capture must not
    cuda_check(cudaStreamSynchronize(gpu.stream), "bench");
    cudaGraph_t captured = nullptr;
    cudaGraphExec_t graph = nullptr;
    cuda_check(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < n; ++i) run(i);
    cuda_check(cudaStreamEndCapture(gpu.stream, &captured), "capture");
    cuda_check(cudaGraphInstantiate(&graph, captured, 0), "graph");
    cudaGraphDestroy(captured);
    cudaEvent_t begin, end;
    cuda_check(cudaEventCreate(&begin), "event");
    cuda_check(cudaEventCreate(&end), "event");
    std::vector<float> times;
    for (int batch = -2; batch < kBatches; ++batch) {
      cuda_check(cudaEventRecord(begin, gpu.stream), "event");
      cuda_check(cudaGraphLaunch(graph, gpu.stream), "graph");
      cuda_check(cudaEventRecord(end, gpu.stream), "event");
      cuda_check(cudaEventSynchronize(end), "event");
      float milliseconds = 0;
      cuda_check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
      if (batch >= 0) times.push_back(milliseconds * 1e3f / static_cast<float>(n));
    }
    cudaGraphExecDestroy(graph);
    std::nth_element(times.begin(), times.begin() + kBatches / 2, times.end());
    return times[kBatches / 2];
  }

  /// A mebi of values of next(), over and over, up to `count`.
  template <typename T>
  DeviceMemory random(int64_t count, const std::function<T()>& next) {
    constexpr int64_t kPool = int64_t{1} << 20;
    std::vector<T> pool(static_cast<size_t>(std::min(count, kPool)));
    for (T& value : pool) value = next();
    constexpr int64_t kSize = sizeof(T);
    DeviceMemory memory(count * kSize, "bench");
    for (int64_t at = 0; at < count; at += kPool) {
      cuda_check(cudaMemcpy(memory.as<T>() + at, pool.data(),
                            static_cast<size_t>(std::min(count - at, kPool) * kSize),
                            cudaMemcpyHostToDevice),
                 "copy");
    }
    return memory;
  }
  DeviceMemory random_bytes(int64_t bytes, uint32_t mask = ~0u) {
    return random<uint32_t>((bytes + 3) / 4,
                            [&] { return static_cast<uint32_t>(generator()) & mask; });
  }
  DeviceMemory random_floats(int64_t count) {
    std::normal_distribution<float> normal;
    return random<float>(count, [&] { return normal(generator); });
  }
  DeviceMemory random_halves(int64_t count) {
    std::normal_distribution<float> normal;
    return random<__half>(count, [&] { return __float2half(normal(generator)); });
  }
  DeviceMemory random_scales(int64_t count) {
    return random<__half>(count, [&] {
      return __float2half(0.001f + 0.002f * static_cast<float>(generator() >> 8) * 0x1p-24f);
    });
  }
};

// A matrix in fragment order with random contents.
struct Weights {
  FragmentView view = {};
  DeviceMemory codes, scales, multiples, units;
  Weights(Bench& bench, const DeviceMemory& noise, int64_t rows, int64_t cols, int64_t group,
          bool two_level) {
    view.rows = rows;
    view.cols = cols;
    view.padded_cols = (cols + kBlockCols - 1) / kBlockCols * kBlockCols;
    view.n_panels = (rows + kPanelRows - 1) / kPanelRows;
    const int64_t panels = (view.n_panels + 7) / 8 * 8;
    view.group_shift = group_shift(group, view.padded_cols);
    view.n_groups = padded_groups(view.group_shift, view.padded_cols);
    const int64_t bytes = panels * kPanelRows * view.padded_cols / 2;
    codes = DeviceMemory(bytes, "bench");
    cuda_check(cudaMemcpy(codes.as<void>(), noise.as<void>(), static_cast<size_t>(bytes),
                          cudaMemcpyDeviceToDevice),
               "copy");
    scales = bench.random_scales(panels * kPanelRows * view.n_groups);
    view.codes = codes.as<uint4>();
    view.scales = scales.as<__half2>();
    if (!two_level) return;
    multiples = bench.random<uint8_t>(panels * kPanelRows * view.n_groups, [&] {
      return static_cast<uint8_t>(1 + bench.generator() % kMostMultiple);
    });
    units = bench.random_floats(panels * kPanelRows);
    view.multiples = multiples.as<uchar2>();
    view.units = units.as<float2>();
  }
};

struct Rows {
  RowsJob job = {};
  DeviceMemory x, codes, scales;
  Rows(Bench& bench, int64_t rows, int64_t cols, int bits, int64_t group, bool two_level = false)
      : x(bench.random_floats(rows * cols)) {
    job.rows = rows;
    job.cols = cols;
    job.x = x.as<float>();
    job.n_parts = 1;
    job.bits = bits;
    job.clip = 1.0f;
    job.act_codes = ActCodes::kAll;
    RoundedRows& to = job.rounded;
    to.padded_cols = (cols + kBlockCols - 1) / kBlockCols * kBlockCols;
    const int64_t padded_rows = (rows + kRowStep - 1) / kRowStep * kRowStep;
    if (two_level) job.level_group = static_cast<int32_t>(std::min(group, cols));
    to.group = static_cast<int32_t>(two_level ? to.padded_cols : std::min(group, to.padded_cols));
    to.group_shift = group_shift(to.group, to.padded_cols);
    to.order = code_order(rows, two_level ? 8 : bits, bench.gpu);
    codes = DeviceMemory(padded_rows * to.padded_cols, "bench");
    to.n_groups = padded_groups(to.group_shift, to.padded_cols);
    scales = DeviceMemory(padded_rows * to.n_groups * 4, "bench");
    to.codes = codes.as<uint8_t>();
    to.scales = scales.as<float>();
    launch_rows(job, bench.gpu);
  }
};

struct Shape {
  const char* name;
  int64_t out, in;
};
// Of Qwen3-8B; Llama-3-8B has the first two and wider FFNs; Llama-3.2-1B.
constexpr Shape kShapes[] = {
    {"o_proj 4096x4096", 4096, 4096},    {"qkv 6144x4096", 6144, 4096},
    {"gate_up 24576x4096", 24576, 4096}, {"down 4096x12288", 4096, 12288},
    {"gate_up 28672x4096", 28672, 4096}, {"down 4096x14336", 4096, 14336},
    {"qkv 3072x2048", 3072, 2048},       {"gate_up 16384x2048", 16384, 2048},
    {"down 2048x8192", 2048, 8192}};

int copies_beyond_cache(const Bench& bench, int64_t bytes, int64_t rows) {
  return static_cast<int>(
      rows > 64 ? 2 : std::clamp<int64_t>(3 * bench.gpu.facts.l2_bytes / bytes, 4, 40));
}

// Times of cuBLASLt on one shape, microseconds; 0 where it has no such product.
struct Yardsticks {
  double us[3] = {};
};
Yardsticks bench_cublas(Bench& bench, const Shape& shape, int64_t rows,
                        const std::vector<Yardstick>& types = {Yardstick::kBf16, Yardstick::kFp8,
                                                               Yardstick::kInt8}) {
  Yardsticks times;
  for (const Yardstick type : types) {
    const CublasProduct product(type, rows, shape.out, shape.in);
    const int copies = copies_beyond_cache(bench, product.weight_bytes(), rows);
    // Numbers, not infinities, whatever type reads them.
    constexpr uint32_t kFinite = 0xB7B7B7B7;
    const DeviceMemory x = bench.random_bytes(product.input_bytes(), kFinite);
    const DeviceMemory w = bench.random_bytes(copies * product.weight_bytes(), kFinite);
    const DeviceMemory y(product.output_bytes(), "bench");
    double best = 0;
    for (int way = 0; way < product.n_ways(); ++way) {
      const double us = bench.time(copies, [&](int i) {
        product.run(way, w.as<uint8_t>() + i * product.weight_bytes(), x.as<void>(), y.as<void>(),
                    bench.gpu.stream);
      });
      if (best == 0 || us < best) best = us;
    }
    times.us[static_cast<int>(type)] = best;
  }
  return times;
}

void bench_packed(Bench& bench, const Shape& shape, int64_t rows, int64_t group, int64_t rank,
                  bool two_level, const Yardsticks& yardsticks) {
  const int64_t bytes = shape.out * shape.in / 2 + shape.out * shape.in / group * 2 +
                        rank * (shape.out + shape.in) * 17 / 32;
  const int copies = copies_beyond_cache(bench, bytes, rows);
  const DeviceMemory noise = bench.random_bytes(std::max(shape.out, int64_t{1024}) * shape.in / 2);
  Rows x(bench, rows, shape.in, 4, group, two_level);
  Rows h(bench, rows, std::max<int64_t>(rank, 64), 4, group, two_level);
  const DeviceMemory y(rows * shape.out * 4, "bench"), narrow(rows * 1024 * 4, "bench");
  std::vector<Weights> r, a, b;
  for (int i = 0; i < copies; ++i) {
    r.emplace_back(bench, noise, shape.out, shape.in, group, two_level);
    if (rank == 0) continue;
    a.emplace_back(bench, noise, rank, shape.in, group, two_level);
    b.emplace_back(bench, noise, shape.out, rank, group, two_level);
  }
  h.job.x = narrow.as<float>();
  const auto launch = [&](const PackedJob& job) { launch_packed(job, bench.gpu); };
  const double us = bench.time(copies, [&](int i) {
    const size_t at = static_cast<size_t>(i);
    PackedJob job = {};
    job.x = x.job.rounded;
    job.rows = rows;
    job.n_segments = 1;
    // As the executor does.
    PackedSegment main = {};
    if (rank > 0) {
      main.b = b[at].view;
      main.h = h.job.rounded;
      PackedJob down = job;
      down.segments[0].w = a[at].view;
      down.segments[0].narrow = h.job;
      if (takes_down_two_level(down, bench.gpu)) {
        launch_down_two_level(down, bench.gpu);
      } else {
        const std::vector<int32_t> parts =
            column_parts(a[at].view.padded_cols / kBlockCols, kMaxLinears, rows);
        down.n_segments = static_cast<int>(parts.size()) - 1;
        for (int part = 0; part < down.n_segments; ++part) {
          PackedSegment& segment = down.segments[part];
          segment = {};
          segment.w = a[at].view;
          segment.y = narrow.as<float>() + part * rows * rank;
          segment.first_block = parts[static_cast<size_t>(part)];
          segment.n_blocks = parts[static_cast<size_t>(part) + 1] - segment.first_block;
        }
        launch(down);
        h.job.n_parts = down.n_segments;
        if (matvec_rounds_narrow(h.job)) {
          main.narrow = h.job;
          job.blocks_ahead = down.n_segments * static_cast<int32_t>(a[at].view.n_panels);
        } else {
          launch_rows(h.job, bench.gpu);
        }
      }
    }
    job.segments[0] = main;
    job.segments[0].w = r[at].view;
    job.segments[0].y = y.as<float>();
    launch(job);
  });
  const double ops = 2.0 * static_cast<double>(rows) * static_cast<double>(shape.out * shape.in);
  const double share = static_cast<double>(bytes) / us * 1e6 / bench.bandwidth;
  const auto over = [&](Yardstick type) { return yardsticks.us[static_cast<int>(type)] / us; };
  std::printf(
      "%-20s m %5lld group %3lld%s rank %3lld: %9.2f us %8.1f TOP/s %5.1f %% of bandwidth; over "
      "bf16 "
      "%5.2f x, fp8 %5.2f x, int8 %5.2f x\n",
      shape.name, static_cast<long long>(rows), static_cast<long long>(group),
      two_level ? " two-level" : "", static_cast<long long>(rank), us, ops / us * 1e-6, 100 * share,
      over(Yardstick::kBf16), over(Yardstick::kFp8), over(Yardstick::kInt8));
  bench.records.push_back({{"kernel", "packed"},
                           {"matrix", shape.name},
                           {"m", rows},
                           {"group", group},
                           {"two_level", two_level},
                           {"rank", rank},
                           {"us", us},
                           {"tops", ops / us * 1e-6},
                           {"bandwidth_share", share},
                           {"cublaslt_bf16_us", yardsticks.us[0]},
                           {"cublaslt_fp8_us", yardsticks.us[1]},
                           {"cublaslt_int8_us", yardsticks.us[2]}});
}

// Weights that meet f32 inputs, beside cuBLASLt's product of inputs that were rounded to bf16.
// portable: by the kernel of other GPUs than Hopper.
void bench_dense(Bench& bench, const Shape& shape, int64_t rows, Storage storage, const char* name,
                 const Yardsticks& yardsticks, bool portable = false) {
  const int64_t count = shape.out * shape.in;
  const int64_t bytes = storage == Storage::kQ8 ? count + count / 64 * 2 : count * 2;
  const int copies = std::min(8, copies_beyond_cache(bench, bytes, rows));
  std::vector<DeviceMemory> data, scales;
  for (int i = 0; i < copies; ++i) {
    // Bits that make finite numbers of either 16-bit type.
    data.push_back(bench.random_bytes(bytes, storage == Storage::kQ8 ? ~0u : 0xB7B7B7B7));
    scales.push_back(bench.random_scales(count / 64));
  }
  const DeviceMemory x = bench.random_floats(rows * shape.in), y(rows * shape.out * 4, "bench");
  const double us = bench.time(copies, [&](int i) {
    const size_t at = static_cast<size_t>(i);
    const CanonicalView w = {storage,
                             shape.out,
                             shape.in,
                             64,
                             shape.in / 64,
                             storage == Storage::kQ8 ? shape.in : shape.in * 2,
                             data[at].as<uint8_t>(),
                             scales[at].as<__half>()};
    const DenseJob job = {x.as<float>(), rows, false, 1, {{w, y.as<float>()}}};
    portable ? launch_dense_gemm(job, bench.gpu) : launch_dense(job, bench.gpu);
  });
  const double tflops = 2.0 * static_cast<double>(rows * count) / us * 1e-6;
  const double share = static_cast<double>(bytes) / us * 1e6 / bench.bandwidth;
  std::printf(
      "%-20s m %5lld dense %-4s%s: %9.2f us %8.1f TFLOP/s %5.1f %% of bandwidth; over bf16 %5.2f "
      "x\n",
      shape.name, static_cast<long long>(rows), name, portable ? ", portable" : "", us, tflops,
      100 * share, yardsticks.us[0] / us);
  bench.records.push_back({{"kernel", "dense"},
                           {"matrix", shape.name},
                           {"m", rows},
                           {"storage", name},
                           {"portable", portable},
                           {"us", us},
                           {"tflops", tflops},
                           {"bandwidth_share", share},
                           {"cublaslt_bf16_us", yardsticks.us[0]}});
}

// How much of the memory's bandwidth a kernel of many rows needs that moves so many bytes.
double share(const Bench& bench, double bytes, double us) {
  return bytes / us * 1e6 / bench.bandwidth;
}

// A row on its way into a linear: rounding alone, after a norm, after a sum and a norm, and what
// comes before the down projection. Many rows are read from memory each time.
void bench_rows(Bench& bench, int64_t rows, int64_t cols, bool two_level) {
  Rows x(bench, rows, cols, 4, 64, two_level);
  const int64_t count = rows * cols;
  const int copies = copies_beyond_cache(bench, count * 4, 1);
  const DeviceMemory inputs = bench.random_floats(copies * count), others(count * 4, "bench"),
                     transformed(count * 4, "bench");
  const auto time = [&](const char* what, double arrays, const RowsJob& job) {
    const double us = bench.time(20, [&](int i) {
      RowsJob run = job;
      run.x = inputs.as<float>() + i % copies * count;
      if (job.term) run.term = inputs.as<float>() + (i + 1) % copies * count;
      if (job.up) run.up = inputs.as<float>() + (i + 1) % copies * count;
      launch_rows(run, bench.gpu);
    });
    const double bytes = static_cast<double>(count) * (4 * arrays + 1);
    std::printf("rows %5lld x %5lld%s, %s: %8.2f us, %5.1f %% of bandwidth\n",
                static_cast<long long>(rows), static_cast<long long>(cols),
                two_level ? ", two-level" : "", what, us, 100 * share(bench, bytes, us));
    bench.records.push_back({{"kernel", "rows"},
                             {"what", what},
                             {"rows", rows},
                             {"cols", cols},
                             {"two_level", two_level},
                             {"us", us},
                             {"bandwidth_share", share(bench, bytes, us)}});
  };
  time("round", 1, x.job);
  RowsJob norm = x.job;
  norm.gain = x.x.as<float>();
  norm.eps = 1e-6f;
  time("norm and round", 1, norm);
  norm.term = norm.x;
  norm.sum = others.as<float>();
  time("sum, norm and round", 3, norm);
  RowsJob job = x.job;
  job.up = job.x;
  job.transformed = transformed.as<float>();
  job.block = cols;
  job.base_order = hadamard_base_order(cols);
  const std::vector<int8_t>& base = hadamard_base(job.base_order);
  const DeviceMemory device_base(static_cast<int64_t>(base.size()), "bench");
  cuda_check(cudaMemcpy(device_base.as<void>(), base.data(), base.size(), cudaMemcpyHostToDevice),
             "copy");
  job.base = device_base.as<int8_t>();
  job.hadamard_scale = 0.01f;
  time("SwiGLU, Hadamard and round", 2, job);
}

void bench_heads(Bench& bench, int64_t rows) {
  HeadsJob job = {};
  job.rows = rows;
  job.head_dim = 128;
  job.n_heads = 32;
  job.n_kv_heads = 8;
  const DeviceMemory q = bench.random_floats(rows * 32 * 128), k = bench.random_floats(rows * 1024),
                     v = bench.random_floats(rows * 1024), gain = bench.random_floats(128),
                     angles = bench.random_floats(rows * 128), input(64, "bench"),
                     keys(rows * 2048, "bench"), values(rows * 2048, "bench");
  job.q = q.as<float>(), job.k = k.as<float>(), job.v = v.as<float>();
  job.q_gain = job.k_gain = gain.as<float>();
  job.eps = 1e-6f;
  job.angles = angles.as<float2>();
  job.store = true;
  job.cache = {16, rows, 8, 128, 256, keys.as<uint8_t>(), values.as<uint8_t>(), nullptr, nullptr};
  job.input = input.as<StepInput>();
  const double us = bench.time(20, [&](int) { launch_heads(job, bench.gpu); });
  const double bytes = static_cast<double>(rows) * (2 * 40 + 8 + 2 * 8 / 2) * 512;
  std::printf("heads %5lld rows: %8.2f us, %5.1f %% of bandwidth\n", static_cast<long long>(rows),
              us, 100 * share(bench, bytes, us));
  bench.records.push_back({{"kernel", "heads"}, {"rows", rows}, {"us", us}});
}

void bench_attention(Bench& bench, int64_t rows, int64_t pos0, int bits, int64_t head_dim) {
  const int64_t n_heads = 32, n_kv_heads = 8, ctx = pos0 + rows;
  CacheView cache = {};
  cache.bits = bits;
  cache.ctx = ctx;
  cache.n_kv_heads = n_kv_heads;
  cache.head_dim = head_dim;
  cache.vector_bytes = head_dim * bits / 8;
  const int64_t vectors = n_kv_heads * ctx;
  const int copies =
      rows > 16 ? 1
                : static_cast<int>(std::clamp<int64_t>(
                      3 * bench.gpu.facts.l2_bytes / (2 * vectors * cache.vector_bytes), 2, 30));
  std::vector<DeviceMemory> keys, values, scales;
  for (int i = 0; i < copies; ++i) {
    const int64_t bytes = vectors * cache.vector_bytes;
    for (std::vector<DeviceMemory>* vectors_of : {&keys, &values}) {
      vectors_of->push_back(bits == 32   ? bench.random_floats(bytes / 4)
                            : bits == 16 ? bench.random_halves(bytes / 2)
                                         : bench.random_bytes(bytes));
    }
    scales.push_back(bench.random_scales(2 * vectors));
  }
  const DeviceMemory q = bench.random_floats(rows * n_heads * head_dim);
  const DeviceMemory out(rows * n_heads * head_dim * 4, "bench"), input(64, "bench");
  const int32_t start[2] = {static_cast<int32_t>(pos0), static_cast<int32_t>(ctx)};
  cuda_check(cudaMemcpy(input.as<void>(), start, 8, cudaMemcpyHostToDevice), "copy");
  AttentionJob job = {};
  job.q = q.as<float>();
  job.out = out.as<float>();
  job.rows = rows;
  job.n_heads = n_heads;
  job.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim)));
  job.input = input.as<StepInput>();
  job.n_splits = attention_splits(cache, rows, ctx, bench.gpu);
  const DeviceMemory partials(attention_partials(rows, n_heads, head_dim, job.n_splits) * 4 + 16,
                              "bench");
  job.partials = partials.as<float>();
  const DeviceMemory counters(kAttentionCounters * 4, "bench");
  job.counters = counters.as<int32_t>();
  const double us = bench.time(rows > 16 ? 8 : copies, [&](int i) {
    const size_t at = static_cast<size_t>(i % copies);
    job.cache = cache;
    job.cache.keys = keys[at].as<uint8_t>();
    job.cache.values = values[at].as<uint8_t>();
    job.cache.key_scales = job.cache.value_scales = scales[at].as<__half2>();
    if (attention_prefill_takes(cache, rows)) {
      launch_attention_prefill(job, bench.gpu);
    } else {
      launch_attention_decode(job, bench.gpu);
    }
  });
  const double n = static_cast<double>(rows);
  const double pairs = n * static_cast<double>(pos0) + n * (n + 1) / 2;
  const double ops = 4.0 * pairs * static_cast<double>(n_heads * head_dim);
  const double bytes =
      static_cast<double>(2 * vectors * (cache.vector_bytes + (bits < 16 ? 4 : 0)));
  std::printf(
      "attention %5lld rows after %6lld, head_dim %3lld, %2d bits: %9.2f us %7.1f TFLOP/s %7.2f "
      "TB/s %5.1f %%\n",
      static_cast<long long>(rows), static_cast<long long>(pos0), static_cast<long long>(head_dim),
      bits, us, ops / us * 1e-6, bytes / us * 1e-6, 100 * bytes / us * 1e6 / bench.bandwidth);
  bench.records.push_back({{"kernel", "attention"},
                           {"rows", rows},
                           {"keys_before", pos0},
                           {"head_dim", head_dim},
                           {"kv_bits", bits},
                           {"us", us},
                           {"tflops", ops / us * 1e-6},
                           {"bandwidth_share", bytes / us * 1e6 / bench.bandwidth}});
}

void run(const std::string& part, const std::string& json) {
  Bench bench;
  std::printf("%s, %d SMs, reads %.0f GB/s\n", bench.gpu.facts.name.c_str(), bench.gpu.facts.n_sms,
              bench.bandwidth * 1e-9);
  const auto wanted = [&](const char* which) { return part.empty() || part == which; };
  for (const Shape& shape : kShapes) {
    for (const int64_t rows : {1, 2, 4, 8, 16, 64, 256, 512, 1024, 2048, 4096}) {
      if (!wanted(rows <= kMatvecRows ? "matvec" : "gemm")) continue;
      const Yardsticks yardsticks = bench_cublas(bench, shape, rows);
      for (const int64_t group : {64, 128}) {
        for (const int64_t rank : {0, 128}) {
          for (const bool two_level : {false, true}) {
            bench_packed(bench, shape, rows, group, rank, two_level, yardsticks);
          }
        }
      }
    }
  }
  if (wanted("dense")) {
    const Shape head = {"head 151936x4096", 151936, 4096};
    for (const Shape& shape : {kShapes[0], kShapes[2], kShapes[3], head}) {
      for (const int64_t rows : {1, 4, 16, 64, 512, 2048}) {
        if (shape.out == head.out && rows > 512) continue;
        const Yardsticks yardsticks = bench_cublas(bench, shape, rows, {Yardstick::kBf16});
        bench_dense(bench, shape, rows, Storage::kBF16, "bf16", yardsticks);
        bench_dense(bench, shape, rows, Storage::kF16, "f16", yardsticks);
        bench_dense(bench, shape, rows, Storage::kQ8, "q8", yardsticks);
        if (rows >= 64) bench_dense(bench, shape, rows, Storage::kBF16, "bf16", yardsticks, true);
      }
    }
  }
  if (wanted("rows")) {
    for (const int64_t rows : {1, 16, 64, 512, 2048}) {
      for (const bool two_level : {false, true}) {
        for (const int64_t cols : {4096, 12288, 14336}) bench_rows(bench, rows, cols, two_level);
      }
      bench_heads(bench, rows);
    }
  }
  if (wanted("attention")) {
    for (const int bits : {16, 8, 4}) {
      for (const int64_t pos0 : {512, 4096, 32768}) bench_attention(bench, 1, pos0, bits, 128);
      for (const int64_t head_dim : {64, 128}) {
        for (const int64_t rows : {1024, 2048, 4096}) {
          bench_attention(bench, rows, 0, bits, head_dim);
        }
      }
    }
    bench_attention(bench, 512, 32256, 16, 128);
    for (const int64_t head_dim : {64, 128}) bench_attention(bench, 4096, 0, 32, head_dim);
  }
  if (json.empty()) return;
  const Json report = {{"gpu", bench.gpu.facts.name},
                       {"multiprocessors", bench.gpu.facts.n_sms},
                       {"read_bandwidth", bench.bandwidth},
                       {"kernels", bench.records}};
  std::ofstream file(json);
  file << report.dump(1) << "\n";
  if (!file) throw Error(ErrorKind::kIo, "cannot write", json, "see the file system");
}

}  // namespace
}  // namespace tq::cuda

int main(int argc, char** argv) {
  std::string part, json;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--json" && i + 1 < argc) {
      json = argv[++i];
    } else {
      part = argument;
    }
  }
  try {
    tq::cuda::run(part, json);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_cuda: %s\n", error.what());
    return 4;
  }
}
