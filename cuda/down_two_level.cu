// down_two_level - x' A^T of the low-rank component, summed and rounded to h' in one kernel: many
// tokens on Hopper, two-level scales, ranks of up to 128.
//
// down_two_level - h_s' = rounded(x' A_s^T) for all linears s that read the same x'
// Shapes    A in fragment order with multiples (weights.h), x', h' bytes in tiles
// Work      a cluster of up to 8 blocks has 128 tokens of one A, a block of it a part of the
//           columns, multiplied as in twin_gemm_two_level.cu. A block then adds the sums of all for
//           its share of the tokens, read from the others' shared memory, and rounds them, a warp a
//           token
// Memory    x' once for each A, from the second-level cache; a block's 64 KB of sums lie in the
//           stages' memory once those are done
// Constants bound: latency (start, first stage, two cluster barriers, the rounding of a token). 8
//           parts of 4096 columns are 4 stages each; many tokens have fewer parts
// Requires  sm_90a; groups of A as in twin_gemm_two_level.cu; h rounded in groups of 32, 64 or 128
// Error     integers exact; a value is its sum times one product of two scales;
//           tests/test_cuda_linears.cpp
// Measured  H100, Qwen3-8B shape, rank 128, `tq bench --two-level --rank 128`, 2026-11-28, tok/s of
//           prefill with the three separate kernels and with this one: 64 tokens 8.2k, 9.5k; 512
//           38.6k, 43.5k; 1024 49.6k, 52.5k; 2048 55.9k, 55.7k
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/rounding.cuh"
#include "cuda/two_level.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

using namespace two_level;

constexpr int kTokens = 128, kMostParts = 8;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kWarps = kConsumers / kWarp;  // that multiply and round
constexpr int kPitch = kTileRows + 4;       // sums of a token: lanes of a warp meet no bank twice

// A warp's token: a lane has four columns of h, `x` of them.
__device__ inline void round_token(const RowsJob& job, int64_t token, float (&x)[1][4]) {
  const int col = threadIdx.x % kWarp * 4, cols = static_cast<int>(job.cols);
  float largest = 0, unit = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (col + i >= cols) x[0][i] = 0;
    largest =
        __uint_as_float(max(__float_as_uint(largest), __float_as_uint(x[0][i]) & 0x7FFFFFFFu));
  }
  if (job.level_group > 0) {
    largest = __uint_as_float(__reduce_max_sync(kFullMask, __float_as_uint(largest)));
    unit = level_unit(job, largest);
    if (col == 0) job.rounded.scales[scale_offset(job.rounded, token, 0)] = unit;
  }
  const StretchPlace place(job.rounded, token);
  round_stretches<1>(job, token, 0, unit, place, x);
  if ((col & ~7) >= cols) *reinterpret_cast<uint32_t*>(place.codes) = 0;
  if (job.level_group == 0 && col >= cols && col % job.rounded.group == 0) {
    job.rounded.scales[scale_offset(job.rounded, token, col / job.rounded.group)] = 0;
  }
}

template <typename S>
__device__ inline void run(const PackedJob& job) {
  extern __shared__ __align__(1024) uint8_t bytes[];
  auto& shared = *reinterpret_cast<Shared<S>*>(bytes);
  const PackedSegment& segment = job.segments[blockIdx.z];
  const int64_t first_token = blockIdx.y * int64_t{kTokens};
  const int part = blockIdx.x, n_parts = gridDim.x;
  const int n_stages = static_cast<int>(segment.w.padded_cols / kBlockCols);
  const int begin = n_stages * part / n_parts, end = n_stages * (part + 1) / n_parts;
  init_barriers(shared);
  begin_kernel();
  if (threadIdx.x >= kConsumers) {
    give_registers<24>();
    if (threadIdx.x == kConsumers) {
      const Side side = {segment.w, job.x};
      for (int index = begin; index < end; ++index) {
        const int slot = (index - begin) % S::kStages, round = (index - begin) / S::kStages;
        if (round > 0) shared.free[slot].wait((round - 1) % 2);
        side.load(shared.stages[slot], index, 0, first_token, (job.rows - 1) / kRowStep,
                  shared.full[slot]);
      }
    }
    __syncwarp();
    sync_cluster();  // as below
    sync_cluster();
    return;
  }
  take_registers<240>();
  // Of the tokens that the warp will round, and of the columns that the lane will have.
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int n_own = kTokens / n_parts / kWarps, first_own = part * (kTokens / n_parts) + warp;
  float scales = 0, units[4];
  if (const int64_t token = first_token + first_own + lane * kWarps;
      lane < n_own && token < job.rows) {
    scales = job.x.scales[scale_offset(job.x, token, 0)];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = lane * 4 + i;
    const float2 pair = segment.w.units[row / kPanelRows * 8 + row % 8];
    units[i] = row % kPanelRows < 8 ? pair.x : pair.y;
  }
  Warpgroup<S> warpgroup;
  warpgroup.multiply(shared, 0, end - begin, group_step(segment.w));
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");  // the stages are done with
  auto* sums_of_part = reinterpret_cast<int32_t*>(bytes);
  static_assert(sizeof(shared.stages) >= kTokens * kPitch * 4);
#pragma unroll
  for (int i = 0; i < S::kSums; ++i) {
    const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
    sums_of_part[token * kPitch + warp * kPanelRows + lane / 4 + i / 2 % 2 * 8] = warpgroup.sums[i];
  }
  sync_cluster();
  for (int i = 0; i < n_own; ++i) {
    const int token = first_own + i * kWarps;
    if (first_token + token >= job.rows) break;
    int4 sums[kMostParts];  // asked for at once
#pragma unroll
    for (int from = 0; from < kMostParts; ++from) {
      sums[from] = {0, 0, 0, 0};
      if (from < n_parts) {
        sums[from] = load_four_from_cluster(sums_of_part + token * kPitch + lane * 4, from);
      }
    }
    int4 total = sums[0];
#pragma unroll
    for (int from = 1; from < kMostParts; ++from) {
      total.x += sums[from].x, total.y += sums[from].y;
      total.z += sums[from].z, total.w += sums[from].w;
    }
    const float of_token = __shfl_sync(kFullMask, scales, i);
    float x[1][4] = {{static_cast<float>(total.x) * (units[0] * of_token),
                      static_cast<float>(total.y) * (units[1] * of_token),
                      static_cast<float>(total.z) * (units[2] * of_token),
                      static_cast<float>(total.w) * (units[3] * of_token)}};
    round_token(segment.narrow, first_token + token, x);
  }
  sync_cluster();  // until then others read here
}

#endif

template <typename S>
__global__ void __launch_bounds__(kThreads, 1)
    down_two_level_kernel(const __grid_constant__ PackedJob job) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  run<S>(job);
#endif
}

int64_t n_tiles(const PackedJob& job) {
  return (job.rows + kTokens - 1) / kTokens;
}

// Parts of the columns, such that all blocks are there at once: not every multiprocessor has
// neighbours for a cluster.
int64_t parts_of(const PackedJob& job, const Gpu& gpu) {
  const int64_t n_stages = job.segments[0].w.padded_cols / kBlockCols;
  const int64_t n_clusters = n_tiles(job) * job.n_segments;
  int64_t n_parts = 1;
  while (n_parts < kMostParts && n_parts * 2 <= n_stages &&
         n_clusters * n_parts * 2 <= gpu.facts.n_sms * 3 / 4) {
    n_parts *= 2;
  }
  return n_parts;
}

template <bool kGroups32>
void launch_groups(const PackedJob& job, const Gpu& gpu) {
  using S = Shape<kTokens, kGroups32>;
  const int64_t n_parts = parts_of(job, gpu);
  const dim3 grid(static_cast<unsigned>(n_parts), static_cast<unsigned>(n_tiles(job)),
                  static_cast<unsigned>(job.n_segments));
  launch_clusters(gpu, "down", down_two_level_kernel<S>, grid, dim3(kThreads), sizeof(Shared<S>),
                  static_cast<unsigned>(n_parts), job);
}

}  // namespace

bool takes_down_two_level(const PackedJob& job, const Gpu& gpu) {
  // More tiles than fit beside each other, two blocks each, are left to the separate kernels, whose
  // tiles are larger.
  if (gpu.facts.major != 9 || job.rows <= kMatvecRows || job.n_segments == 0 ||
      n_tiles(job) * job.n_segments * 2 > gpu.facts.n_sms * 3 / 4 || !takes_inputs(job.x)) {
    return false;
  }
  for (int i = 0; i < job.n_segments; ++i) {
    const PackedSegment& segment = job.segments[i];
    const RowsJob& narrow = segment.narrow;
    if (!takes_weights(segment.w) || segment.w.n_panels > kSetPanels || !whole_stretches(narrow)) {
      return false;
    }
  }
  return true;
}

void launch_down_two_level(const PackedJob& job, const Gpu& gpu) {
  TQ_CHECK(takes_down_two_level(job, gpu) && job.n_segments <= kMaxLinears);
  int shift = 7;
  for (int i = 0; i < job.n_segments; ++i) shift = std::min(shift, job.segments[i].w.group_shift);
  shift == 5 ? launch_groups<true>(job, gpu) : launch_groups<false>(job, gpu);
}

}  // namespace tq::cuda
