// dense_wgmma - products of many rows with weights that meet f32 inputs, on Hopper, by wgmma.
//
// dense_wgmma - y_s (+)= x W_s^T for linears s that read the same x
// Shapes    W_s [out_s, in] in the file's layout, any storage; x [m, in], y_s [m, out_s] f32
// Work      a block 256 rows of W x 128 rows of x (128 x 128 or 128 x 64 where that fills the
//           device better), 64 columns a stage. Two warpgroups of 128 threads load both, split them
//           into bf16 parts (dense_columns.cuh) and fill a ring of stages in shared memory; two
//           others multiply, each half of the rows of W: both operands from shared memory. f32 x
//           bf16 takes two products of parts, all else three. Few tiles share out their columns
//           among the blocks of a cluster, which add their sums through shared memory
// Memory    a stage: 32 KB of bf16 weights and 32 KB of x for 2^21 products, from the second-level
//           cache. Bound: 2048 clocks of tensor cores a stage (bf16 weights), beside some 330
//           instructions of each of the 8 warps that fill it
// Constants 128 sums a thread that multiplies, of 160 registers; 64 registers of columns under way
//           a thread that loads, of 96 (f32 weights: 96, and some are spilled)
// Requires  sm_90a; tails are guarded
// Error     as dense_gemm.cu's; sums of wgmma are cut, not rounded, to 2^-23:
//           (3 * 2^-18 + 2 gamma_(in + 2)) |x||w|; tests/test_cuda_linears.cpp
// Measured  H100, 8B shapes, 2048 rows, `bench_cuda dense`, 2026-11-28: 299 to 310 TFLOP/s of bf16
//           weights, two products each, 181 to 207 of others; cuBLASLt's single product of inputs
//           rounded to bf16 has 790. More in docs/results.md
#include <algorithm>

#include "cuda/dense_columns.cuh"
#include "cuda/device.cuh"
#include "cuda/wgmma.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kCols = 64, kWarpgroup = 128;
constexpr int kConsumers = 2 * kWarpgroup, kProducers = 2 * kWarpgroup;
constexpr int kThreads = kConsumers + kProducers;

// kBlocks: 64-row blocks of W of a warpgroup; kTokens: rows of x of a block of threads.
template <Storage kStorage_, bool kAligned, int kBlocks_, int kTokens_>
struct Shape {
  static constexpr Storage kStorage = kStorage_;
  static constexpr int kBlocks = kBlocks_, kTokens = kTokens_, kRows = 2 * kBlocks * 64;
  using Weights = Tile<kStorage, kAligned, kRows, kCols, kProducers>;
  using Inputs = Tile<Storage::kF32, kAligned, kTokens, kCols, kProducers>;
  static constexpr int kStageBytes = Weights::kBytes + Inputs::kBytes;
  static constexpr int kStages = std::min(4, (224 << 10) / kStageBytes);
};

template <typename S>
struct Shared {
  alignas(1024) uint8_t stages[S::kStages][S::kStageBytes];
  Barrier full[S::kStages], free[S::kStages];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the kernel is empty

// d (+)= A B for a warpgroup, in the background: A [64, 16], B [16, 2 x registers of d] bf16 in
// shared memory, K along their rows there; d and add as in wgmma().
__device__ inline void wgmma_bf16(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %34, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" TQ_SUM_NAMES_32
      "}, %32, %33, p, 1, 1, 0, 0; }"
      : TQ_SUMS_32("+f", d)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

__device__ inline void wgmma_bf16(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %66, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" TQ_SUM_NAMES_64
      "}, %64, %65, p, 1, 1, 0, 0; }"
      : TQ_SUMS_64("+f", d)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// Stages [begin, end) of 64 columns, by a producer.
template <typename S>
__device__ inline void fill(const CanonicalView& w, const CanonicalView& x, Shared<S>& shared,
                            int64_t first_row, int64_t first_token, int begin, int end) {
  const int thread = threadIdx.x - kConsumers;
  typename S::Weights weights(w, first_row, thread);
  typename S::Inputs inputs(x, first_token, thread);
  for (int index = begin; index < end; ++index) {
    const int slot = (index - begin) % S::kStages, round = (index - begin) / S::kStages;
    weights.load(index * kCols);
    inputs.load(index * kCols);
    if (round > 0) shared.free[slot].wait((round - 1) % 2);
    weights.store(shared.stages[slot]);
    inputs.store(shared.stages[slot] + S::Weights::kBytes);
    publish_writes();
    shared.full[slot].arrive();
  }
}

template <typename S>
struct Warpgroup {
  float sums[S::kBlocks][S::kTokens / 2];

  __device__ void multiply(const uint8_t* stage, bool add) {
    constexpr int kParts = S::Weights::kParts;
    const int first = threadIdx.x / kWarpgroup * S::kBlocks;
    const uint64_t w = swizzled_rows(stage), x = swizzled_rows(stage + S::Weights::kBytes);
    const auto part_of_w = [&](int part, int block) {
      return w + (part * S::kRows + (first + block) * 64) * 8;
    };
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kCols / 16; ++step) {
#pragma unroll
      for (int block = 0; block < S::kBlocks; ++block) {
#pragma unroll
        for (int w_part = kParts - 1; w_part >= 0; --w_part) {
#pragma unroll
          for (int x_part = 1 - w_part; x_part >= 0; --x_part) {
            wgmma_bf16(sums[block], part_of_w(w_part, block) + step * 2,
                       x + x_part * S::kTokens * 8 + step * 2,
                       add || step > 0 || w_part + 1 < kParts || w_part + x_part < 1);
          }
        }
      }
    }
    wgmma_commit();
  }
};

// The blocks of a cluster have a part of the columns each. Adds their sums, in order, through
// shared memory; a block does so for, and calls store(first token, sums) with, 8 tokens at a time.
template <typename S, typename Store>
__device__ inline void add_parts(Shared<S>& shared, const float (&sums)[S::kTokens / 2], int part,
                                 int n_parts, const Store& store) {
  auto* shelf = reinterpret_cast<float(*)[kConsumers]>(shared.stages);
  static_assert(sizeof(shared.stages) >= sizeof(*shelf) * (S::kTokens / 2));
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");  // nobody multiplies any more
#pragma unroll
  for (int i = 0; i < S::kTokens / 2; ++i) shelf[i][threadIdx.x] = sums[i];
  sync_cluster();
  for (int tokens = part * 8; tokens < S::kTokens; tokens += n_parts * 8) {
    float total[4] = {};
    for (int from = 0; from < n_parts; ++from) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[i] += load_from_cluster(&shelf[tokens / 2 + i][threadIdx.x], from);
      }
    }
    store(tokens, total);
  }
  sync_cluster();  // until then others read here
}

template <typename S>
__device__ inline void run(const DenseJob& job, int n_parts) {
  extern __shared__ __align__(1024) uint8_t bytes[];
  auto& shared = *reinterpret_cast<Shared<S>*>(bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      shared.full[i].init(kProducers);
      shared.free[i].init(kConsumers);
    }
    publish_barriers();
  }
  __syncthreads();
  begin_kernel();
  constexpr bool kCut = S::kTokens == 64;  // the columns may be, between blocks of a cluster
  const int part = kCut ? blockIdx.x % n_parts : 0;
  int64_t tile = blockIdx.y;
  const DenseSegment& segment = segment_of(job, tile, S::kRows);
  const int64_t first_row = tile * S::kRows;
  const int64_t first_token = blockIdx.x / (kCut ? n_parts : 1) * int64_t{S::kTokens};
  const int n_stages = static_cast<int>((segment.w.cols + kCols - 1) / kCols);
  const int begin = kCut ? n_stages * part / n_parts : 0;
  const int end = kCut ? n_stages * (part + 1) / n_parts : n_stages;
  if (threadIdx.x >= kConsumers) {
    give_registers<96>();
    fill(segment.w, rows_view(job.x, job.rows, segment.w.cols), shared, first_row, first_token,
         begin, end);
    __syncwarp();
    if (kCut && n_parts > 1) {  // as in add_parts()
      sync_cluster();
      sync_cluster();
    }
    return;
  }
  take_registers<160>();
  Warpgroup<S> warpgroup;
  for (int index = 0; index < end - begin; ++index) {
    shared.full[index % S::kStages].wait(index / S::kStages % 2);
    warpgroup.multiply(shared.stages[index % S::kStages], index > 0);
    wgmma_wait<1>();
    if (index > 0) shared.free[(index - 1) % S::kStages].arrive();
  }
  wgmma_wait<0>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int block = 0; block < S::kBlocks; ++block) {
    hold(warpgroup.sums[block]);
    const int64_t row = first_row + (warp / 4 * S::kBlocks + block) * 64 + warp % 4 * 16 + lane / 4;
    const auto store = [&](int token, auto& sums) {
      const auto each = [&](const auto& visit) {
        each_sum(sums, row, segment.w.rows, first_token + token, job.rows, visit);
      };
      // One after the other, so that no load waits for the one before it.
      if (job.accumulate) each([&](int64_t at, float& sum) { sum += segment.y[at]; });
      each([&](int64_t at, float& sum) { segment.y[at] = sum; });
    };
    if constexpr (kCut) {
      static_assert(S::kBlocks == 1);
      if (n_parts > 1) return add_parts(shared, warpgroup.sums[block], part, n_parts, store);
    }
    store(0, warpgroup.sums[block]);
  }
}

#endif

template <typename S>
__global__ void __launch_bounds__(kThreads, 1)
    dense_wgmma_kernel(const __grid_constant__ DenseJob job, int n_parts) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  run<S>(job, n_parts);
#endif
}

template <typename S>
int64_t tiles(const DenseJob& job) {
  return count_row_tiles(job, S::kRows) * ((job.rows + S::kTokens - 1) / S::kTokens);
}

template <typename S>
void launch_shape(const DenseJob& job, const Gpu& gpu, unsigned n_parts = 1) {
  const dim3 grid(static_cast<unsigned>((job.rows + S::kTokens - 1) / S::kTokens) * n_parts,
                  static_cast<unsigned>(count_row_tiles(job, S::kRows)));
  launch_clusters(gpu, "dense wgmma", dense_wgmma_kernel<S>, grid, dim3(kThreads),
                  sizeof(Shared<S>), n_parts, job, static_cast<int>(n_parts));
}

template <Storage kStorage, bool kAligned>
void launch_storage(const DenseJob& job, const Gpu& gpu) {
  using Small = Shape<kStorage, kAligned, 1, 64>;
  // Few tiles: their columns are cut, into at least 4 stages each.
  unsigned n_parts = 1;
  while (n_parts < 8 && tiles<Small>(job) * n_parts * 2 <= gpu.facts.n_sms &&
         job.segments[0].w.cols >= n_parts * 2 * 4 * kCols) {
    n_parts *= 2;
  }
  // Columns one by one take as long whatever the shape.
  if (!kAligned || n_parts > 1) return launch_shape<Small>(job, gpu, n_parts);
  using Large = Shape<kStorage, true, 2, 128>;
  using Medium = Shape<kStorage, true, 1, 128>;
  // Rounds of the device times what a tile takes.
  const int64_t n_sms = gpu.facts.n_sms;
  const auto rounds = [&](int64_t count) { return (count + n_sms - 1) / n_sms; };
  const int64_t large = rounds(tiles<Large>(job)) * 100, medium = rounds(tiles<Medium>(job)) * 55,
                small = rounds(tiles<Small>(job)) * 33;
  if (large <= std::min(medium, small)) return launch_shape<Large>(job, gpu);
  medium <= small ? launch_shape<Medium>(job, gpu) : launch_shape<Small>(job, gpu);
}

}  // namespace

void launch_dense_wgmma(const DenseJob& job, const Gpu& gpu) {
  TQ_CHECK(gpu.facts.major == 9 && count_row_tiles(job, 128) < 65536);
  visit_storage(job.segments[0].w.storage, [&](auto storage) {
    rows_aligned(job, 8) ? launch_storage<storage, true>(job, gpu)
                         : launch_storage<storage, false>(job, gpu);
  });
}

}  // namespace tq::cuda
