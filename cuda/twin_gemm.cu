// twin_gemm - 4-bit linears for many tokens on Hopper: both components in one kernel, by wgmma.
//
// twin_gemm - y_s (+)= x' R_s^T + h_s' B_s^T for all linears s that read the same rounded x
// Shapes    R, B in fragment order (weights.h), x', h' rounded rows in tiles, y_s [m, out_s] f32
// Work      a block 256 rows of weights x 128 tokens (128 x 128 or 128 x 64 where that fills the
//           device better). One thread has the copy engine bring stages of 128 columns; two
//           warpgroups of 128 threads multiply 64 rows at a time: weights are operand A, expanded
//           from nibbles in registers, tokens are operand B, read from shared memory as they lie in
//           memory. Sums of one half of the tokens are scaled while the other half is multiplied.
//           The low-rank component is a few more stages of the same loop: no second pass or write
// Memory    16 KB of weights and 16 KB of tokens a stage for 2^22 products: 128 products a byte of
//           second-level cache
// Constants inputs of up to 4 bits are e4m3 numbers: their sums are exact (wgmma.cuh) and come as
//           floats, FMUL and FFMA a sum and group. Inputs of 8 bits are s8; the bits of 1.5 * 2^23
//           added to a sum make it a float, as in packed_gemm.cu. Bound: as if nothing else were
//           issued while the tensor cores work (docs/results.md): 1024 clocks of products a stage,
//           then some 250 instructions for each 64 x 128 sums and group
// Requires  sm_90a; groups of 2^n >= 32 columns or whole rows (weights.cpp, fits_fragments);
//           rounded rows allocated to a multiple of 128
// Error     dots exact; groups are added in the CPU's order, stages of groups over 128 columns one
//           by one: gamma_n_groups sum_g |scale dot|; tests/test_cuda_ops.cpp
// Source    the two components share input and output as in SVDQuant (Li et al. 2024); producer and
//           consumers as in DeepGEMM and CUTLASS's warp-specialised kernels
#include <algorithm>
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/mma.cuh"
#include "cuda/wgmma.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kConsumers = 256;  // threads
constexpr int kThreads = kConsumers + 128;
constexpr int kStages = 6;

// What differs between the kernels. kFp8: e4m3 in place of s8; kInner: columns between two
// additions to the f32 sums; kBlocks: 64-row blocks of a warpgroup; kTokens: of a block of threads.
template <bool kFp8_, int kInner_, int kBlocks_, int kTokens_>
struct Shape {
  static constexpr bool kFp8 = kFp8_;
  static constexpr int kInner = kInner_, kBlocks = kBlocks_, kTokens = kTokens_;
  static constexpr int kPanels = 8 * kBlocks, kGroups = kBlockCols / kInner;
  static constexpr int kBlocksOfThreads = kBlocks * kTokens == 64 ? 2 : 1;  // of a multiprocessor
  using Dot = std::conditional_t<kFp8, float, int32_t>;
};

template <typename S>
struct alignas(1024) Stage {
  uint4 tokens[S::kTokens][8];           // as they lie in memory (code_offset)
  uint4 weights[S::kPanels][2 * kWarp];  // [panel][half of 64 columns, lane]
  __half2 weight_scales[S::kBlocks][S::kGroups][kSetPanels][8];
  float token_scales[S::kGroups][S::kTokens];
};

template <typename S>
struct Shared {
  Stage<S> stages[kStages];
  Barrier full[kStages], free[kStages];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the kernel is empty

// Groups of a stage, for a side whose columns are grouped by 2^shift.
__device__ inline int groups_of_stage(int shift) {
  return kBlockCols >> min(shift, 7);
}

// One side of the product: a matrix and tokens over the same columns.
struct Side {
  const FragmentView& w;
  const RoundedRows& x;

  // One thread: the copies of columns [128 index, 128 index + 128), all reported to `full`.
  template <typename S>
  __device__ void load(Stage<S>& stage, int index, int64_t first_set, int64_t first_token,
                       Barrier& full) const {
    const int w_groups = groups_of_stage(w.group_shift), x_groups = groups_of_stage(x.group_shift);
    const int w_bytes = w_groups * kSetScales * 4, x_bytes = S::kTokens * 4;
    full.arrive_expecting(sizeof(stage.tokens) + sizeof(stage.weights) + S::kBlocks * w_bytes +
                          x_groups * x_bytes);
    const int64_t col = index * kBlockCols, n_stages = w.padded_cols / kBlockCols;
    copy_bulk(stage.tokens,
              x.codes + (first_token / kRowStep * n_stages + index) * (kRowStep * kBlockCols) +
                  first_token % kRowStep * kBlockCols,
              sizeof(stage.tokens), full);
    const int64_t last_set = (w.n_panels - 1) / kSetPanels;
    for (int i = 0; i < S::kBlocks; ++i) {
      // Behind the last set: any, its sums are not stored.
      const int64_t panel = min(first_set + int64_t{i}, last_set) * kSetPanels;
      copy_bulk(stage.weights[i * kSetPanels], panel_codes(w, panel) + index * kSetCodes,
                kSetCodes * 16, full);
      copy_bulk(stage.weight_scales[i],
                panel_scales(w, panel) + (col >> w.group_shift) * kSetScales, w_bytes, full);
    }
    const float* scales = x.scales + scale_offset(x, first_token, col >> x.group_shift);
    if (S::kTokens == kRowStep) {
      copy_bulk(stage.token_scales, scales, x_groups * x_bytes, full);
    } else {
      for (int i = 0; i < x_groups; ++i) {
        copy_bulk(stage.token_scales[i], scales + i * kRowStep, x_bytes, full);
      }
    }
  }
};

// A warpgroup's products of one stage, added to `sums`. w_skip, x_skip: a scale serves 2^skip times
// kInner columns.
template <typename S>
__device__ inline void multiply(const Stage<S>& stage, int w_skip, int x_skip,
                                float (&sums)[S::kBlocks][S::kTokens / 2]) {
  constexpr int kSteps = S::kInner / 32, kUnits = S::kGroups * S::kBlocks;
  constexpr int kHalf = S::kTokens / 2;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first_panel = warp / 4 * (4 * S::kBlocks) + warp % 4;
  const uint64_t tokens = swizzled_rows(stage.tokens);
  // A unit is a 64-row block and kInner columns. Codes of the next one are expanded while the
  // tensor cores work on this one.
  uint32_t a[2][kSteps][4];
  const auto expand = [&](int unit) {
    const uint4* from = stage.weights[first_panel + unit % S::kBlocks * 4] + lane;
    const int group = unit / S::kBlocks;
    uint32_t(&to)[kSteps][4] = a[unit % 2];
    if constexpr (kSteps == 1) {
      const uint2 words = reinterpret_cast<const uint2*>(from + group / 2 * kWarp)[group % 2];
      expand_codes<S::kFp8>(words.x, words.y, to[0]);
    } else {
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        const uint4 words = from[(group * kSteps + step) / 2 * kWarp];
        expand_codes<S::kFp8>(words.x, words.y, to[step]);
        expand_codes<S::kFp8>(words.z, words.w, to[step + 1]);
      }
    }
  };
  // Half of the tokens is multiplied while the sums of the other half are scaled.
  typename S::Dot dots[2][kHalf / 2];
  const auto start = [&](int unit, int half) {
    hold(dots[half]);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      wgmma(dots[half], a[unit % 2][step],
            tokens + (unit / S::kBlocks * kSteps + step) * 2 + half * (kHalf * 8), step > 0);
    }
    wgmma_commit();
  };
  // Scales of a unit and of half of the tokens; the first ones are loaded while the tensor cores
  // work.
  constexpr int kTiles = kHalf / 8, kEarly = kTiles / 2;
  struct Scales {
    float2 w, early[kEarly];
    uint32_t all;  // in shared memory
  };
  const auto load_scales = [&](int unit, int half) {
    const int group = unit / S::kBlocks, panel = first_panel + unit % S::kBlocks * 4;
    const __half2 w =
        stage.weight_scales[panel / kSetPanels][group >> w_skip][panel % kSetPanels][lane / 4];
    Scales scales;
    scales.w = __half22float2(w);
    // s8 dots are 16 * dot.
    if constexpr (!S::kFp8) scales.w = make_float2(scales.w.x * 0.0625f, scales.w.y * 0.0625f);
    scales.all = shared_address(&stage.token_scales[group >> x_skip][half * kHalf]) + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < kEarly; ++i) scales.early[i] = load_shared(scales.all + i * 32);
    return scales;
  };
  const auto finish = [&](int unit, int half, const Scales& scales) {
    const int block = unit % S::kBlocks;
    hold(dots[half]);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float2 x = i < kEarly ? scales.early[i % kEarly] : load_shared(scales.all + i * 32);
      const float2 w = scales.w;
      const float by[4] = {w.x * x.x, w.x * x.y, w.y * x.x, w.y * x.y};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& sum = sums[block][half * (kHalf / 2) + i * 4 + j];
        if constexpr (S::kFp8) {
          sum = fmaf(dots[half][i * 4 + j], by[j], sum);
        } else {
          sum = fmaf(__int_as_float(dots[half][i * 4 + j] + kRoundMagicBits) - kRoundMagic, by[j],
                     sum);
        }
      }
    }
    // More sums in the making would not fit the registers.
    hold(sums[block]);
  };
  expand(0);
  start(0, 0);
  // Unrolled: a product under way must stay in its registers.
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    start(unit, 1);
    const bool more = unit + 1 < kUnits;
    if (more) expand(unit + 1);
    const Scales first = load_scales(unit, 0);
    wgmma_wait<1>();
    finish(unit, 0, first);
    const Scales second = load_scales(unit, 1);
    if (more) {
      start(unit + 1, 0);
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    finish(unit, 1, second);
  }
}

template <typename S>
__device__ inline void run(const PackedJob& job) {
  extern __shared__ __align__(1024) uint8_t bytes[];
  auto& shared = *reinterpret_cast<Shared<S>*>(bytes);
  int64_t tile = blockIdx.y;
  int which = 0;
  constexpr int kTileRows = S::kPanels * kPanelRows;
  const auto n_tiles = [&](int i) { return (job.segments[i].w.rows + kTileRows - 1) / kTileRows; };
  while (tile >= n_tiles(which)) tile -= n_tiles(which++);
  const PackedSegment& segment = job.segments[which];
  const int64_t first_token = blockIdx.x * int64_t{S::kTokens};
  const int n_main = segment.n_blocks > 0 ? segment.n_blocks
                                          : static_cast<int>(segment.w.padded_cols / kBlockCols);
  const int n_stages = n_main + static_cast<int>(segment.b.padded_cols / kBlockCols);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      shared.full[i].init(1);
      shared.free[i].init(kConsumers / kWarp);
    }
    publish_barriers();
  }
  __syncthreads();
  begin_kernel();
  if (threadIdx.x >= kConsumers) {
    give_registers<24>();
    if (threadIdx.x > kConsumers) return;
    const Side main = {segment.w, job.x}, low_rank = {segment.b, segment.h};
    for (int index = 0; index < n_stages; ++index) {
      const int slot = index % kStages, round = index / kStages;
      if (round > 0) shared.free[slot].wait((round - 1) % 2);
      const bool is_main = index < n_main;
      (is_main ? main : low_rank)
          .load(shared.stages[slot], is_main ? segment.first_block + index : index - n_main,
                tile * S::kBlocks, first_token, shared.full[slot]);
    }
    return;
  }
  // All that the block was launched with, less the producer's.
  take_registers<S::kBlocksOfThreads == 2 ? 104 : 240>();
  // In registers from here on: reading the job's constants again would delay every product.
  const auto skip = [](int shift) {
    int skip = min(shift, 7) - (S::kInner == 128 ? 7 : S::kInner == 64 ? 6 : 5);
    asm volatile("" : "+r"(skip));
    return skip;
  };
  const int w_skip = skip(segment.w.group_shift), x_skip = skip(job.x.group_shift);
  const int b_skip = skip(segment.b.group_shift), h_skip = skip(segment.h.group_shift);
  float sums[S::kBlocks][S::kTokens / 2] = {};
  for (int index = 0; index < n_stages; ++index) {
    const int slot = index % kStages;
    shared.full[slot].wait(index / kStages % 2);
    const bool is_main = index < n_main;
    multiply<S>(shared.stages[slot], is_main ? w_skip : b_skip, is_main ? x_skip : h_skip, sums);
    __syncwarp();
    if (lane == 0) shared.free[slot].arrive();
  }
#pragma unroll
  for (int block = 0; block < S::kBlocks; ++block) {
    const int64_t row =
        tile * kTileRows + (warp / 4 * S::kBlocks + block) * 64 + warp % 4 * kPanelRows + lane / 4;
#pragma unroll
    for (int i = 0; i < S::kTokens / 2; ++i) {
      const int64_t token = first_token + i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int64_t at = row + i / 2 % 2 * 8;
      if (at < segment.w.rows && token < job.rows) {
        store_output(segment, token, at, sums[block][i]);
      }
    }
  }
}

#endif

template <typename S>
__global__ void __launch_bounds__(kThreads, S::kBlocksOfThreads)
    twin_gemm_kernel(const __grid_constant__ PackedJob job) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  run<S>(job);
#endif
}

template <typename S>
int64_t row_tiles(const PackedJob& job) {
  constexpr int64_t kTileRows = S::kPanels * kPanelRows;
  int64_t n_tiles = 0;
  for (int i = 0; i < job.n_segments; ++i) {
    n_tiles += (job.segments[i].w.rows + kTileRows - 1) / kTileRows;
  }
  return n_tiles;
}
template <typename S>
int64_t token_tiles(const PackedJob& job) {
  return (job.rows + S::kTokens - 1) / S::kTokens;
}

template <typename S>
void launch_shape(const PackedJob& job, const Gpu& gpu) {
  const int64_t n_tiles = row_tiles<S>(job);
  TQ_CHECK(n_tiles < 65536);
  const dim3 grid(static_cast<unsigned>(token_tiles<S>(job)), static_cast<unsigned>(n_tiles));
  launch_kernel(gpu, "twin gemm", twin_gemm_kernel<S>, grid, dim3(kThreads), sizeof(Shared<S>),
                job);
}

template <bool kFp8, int kInner>
void launch_inner(const PackedJob& job, const Gpu& gpu) {
  using Large = Shape<kFp8, kInner, 2, 128>;
  using Medium = Shape<kFp8, kInner, 1, 128>;
  using Small = Shape<kFp8, kInner, 1, 64>;
  // Rounds of the device times what a tile takes, as measured at 4096 columns (microseconds, H100):
  // a small one less if its multiprocessor has no second one.
  const int64_t n_sms = gpu.facts.n_sms;
  const auto rounds = [&](int64_t tiles) { return (tiles + n_sms - 1) / n_sms; };
  const int64_t large = rounds(row_tiles<Large>(job) * token_tiles<Large>(job)) * 70;
  const int64_t medium = rounds(row_tiles<Medium>(job) * token_tiles<Medium>(job)) * 38;
  const int64_t small_rounds = rounds(row_tiles<Small>(job) * token_tiles<Small>(job));
  const int64_t small = small_rounds / 2 * 49 + small_rounds % 2 * 33;
  if (large <= std::min(medium, small)) return launch_shape<Large>(job, gpu);
  medium <= small ? launch_shape<Medium>(job, gpu) : launch_shape<Small>(job, gpu);
}

template <bool kFp8>
void launch_type(const PackedJob& job, const Gpu& gpu) {
  const int shift = std::min(7, smallest_group_shift(job));
  TQ_CHECK(shift >= 5);
  shift == 7   ? launch_inner<kFp8, 128>(job, gpu)
  : shift == 6 ? launch_inner<kFp8, 64>(job, gpu)
               : launch_inner<kFp8, 32>(job, gpu);
}

}  // namespace

void launch_twin_gemm(const PackedJob& job, const Gpu& gpu) {
  TQ_CHECK(job.n_segments > 0 && job.n_segments <= kMaxLinears && gpu.facts.major == 9);
  if (job.rows == 0) return;
  job.x.order == CodeOrder::kTilesFp8 ? launch_type<true>(job, gpu) : launch_type<false>(job, gpu);
}

}  // namespace tq::cuda
