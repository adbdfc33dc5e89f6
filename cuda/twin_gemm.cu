// twin_gemm - 4-bit linears for many tokens on Hopper: both components in one kernel, by wgmma.
//
// twin_gemm - y_s (+)= x' R_s^T + h_s' B_s^T for all linears s that read the same rounded x
// Shapes    R, B in fragment order (weights.h), x', h' rounded rows in tiles, y_s [m, out_s] f32
// Work      a block 256 rows of weights x 128 tokens (128 x 128 or 128 x 64 where that fills the
//           device better). One thread has the copy engine bring stages of 128 columns; two
//           warpgroups of 128 threads multiply 64 rows at a time: weights are operand A, expanded
//           from nibbles in registers, tokens are operand B, read from shared memory as they lie in
//           memory. The sums of a unit (64 rows, half of the tokens, a group) are scaled while the
//           next unit is multiplied. The low-rank component is a few more stages of the same loop:
//           no second pass or write
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
//           by one: gamma_n_groups sum_g |scale dot|; tests/test_cuda_linears.cpp
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

// A warpgroup at work: the units of a stage, each 64 rows x half of the tokens x one group, one
// after the other. The tensor cores multiply a unit while the sums of the one before are scaled.
template <typename S>
struct Warpgroup {
  static constexpr int kSteps = S::kInner / 32, kHalf = S::kTokens / 2;
  static constexpr int kUnits = S::kGroups * 2 * S::kBlocks;

  float sums[S::kBlocks][2][kHalf / 2] = {};
  typename S::Dot dots[2][kHalf / 2];
  uint32_t codes[2][kSteps][4];  // of two (group, block), in turn
  float2 token_scales[kHalf / 8];
  int lane, first_panel;

  __device__ Warpgroup() {
    const int warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    first_panel = warp / 4 * (4 * S::kBlocks) + warp % 4;
  }
  // Blocks of a half follow each other: they share the scales of its tokens.
  __device__ static constexpr int block_of(int unit) { return unit % S::kBlocks; }
  __device__ static constexpr int half_of(int unit) { return unit / S::kBlocks % 2; }
  __device__ static constexpr int group_of(int unit) { return unit / (2 * S::kBlocks); }
  __device__ static constexpr int codes_of(int group, int block) {
    return (group * S::kBlocks + block) % 2;
  }

  __device__ void expand(const Stage<S>& stage, int group, int block) {
    const uint4* from = stage.weights[first_panel + block * 4] + lane;
    uint32_t(&to)[kSteps][4] = codes[codes_of(group, block)];
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
  }
  __device__ void start(const Stage<S>& stage, int unit) {
    const int group = group_of(unit);
    const uint64_t tokens = swizzled_rows(stage.tokens) + half_of(unit) * (kHalf * 8);
    hold(dots[unit % 2]);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      wgmma(dots[unit % 2], codes[codes_of(group, block_of(unit))][step],
            tokens + (group * kSteps + step) * 2, step > 0);
    }
    wgmma_commit();
  }
  __device__ void load_token_scales(const Stage<S>& stage, int unit, int x_skip) {
    const float* first = &stage.token_scales[group_of(unit) >> x_skip][half_of(unit) * kHalf];
    const uint32_t at = shared_address(first) + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < kHalf / 8; ++i) token_scales[i] = load_shared(at + i * 32);
  }
  // sums += dots * (scales of tokens) * (scales of weights), in this order: the FFMA finds the
  // weight's scale where it was for the one before. The product of both scales would be a third
  // fresh register of every FFMA, which then takes longer.
  __device__ void scale(const Stage<S>& stage, int unit, int w_skip) {
    const int panel = first_panel + block_of(unit) * 4;
    const __half2 scales = stage.weight_scales[panel / kSetPanels][group_of(unit) >> w_skip]
                                              [panel % kSetPanels][lane / 4];
    float2 w = __half22float2(scales);
    // s8 dots are 16 * dot.
    if constexpr (!S::kFp8) w = make_float2(w.x * 0.0625f, w.y * 0.0625f);
    float(&to)[kHalf / 2] = sums[block_of(unit)][half_of(unit)];
    hold(dots[unit % 2]);
#pragma unroll
    for (int i = 0; i < kHalf / 2; ++i) {
      float dot;
      if constexpr (S::kFp8) {
        dot = dots[unit % 2][i];
      } else {
        dot = __int_as_float(dots[unit % 2][i] + kRoundMagicBits) - kRoundMagic;
      }
      const float2 x = token_scales[i / 4];
      to[i] = fmaf(dot * (i % 2 == 0 ? x.x : x.y), i % 4 < 2 ? w.x : w.y, to[i]);
    }
    // More sums in the making would not fit the registers.
    hold(to);
  }

  /// w_skip, x_skip: a scale serves 2^skip times kInner columns.
  __device__ void multiply(const Stage<S>& stage, int w_skip, int x_skip) {
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) expand(stage, 0, block);
    start(stage, 0);
    // Unrolled: a product under way must stay in its registers.
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const int group = group_of(unit), half = half_of(unit), block = block_of(unit);
      if (unit + 1 < kUnits) start(stage, unit + 1);
      if (block == 0) load_token_scales(stage, unit, x_skip);
      unit + 1 < kUnits ? wgmma_wait<1>() : wgmma_wait<0>();
      // As soon as nobody reads the registers that they go to.
      if (half == S::kBlocks - 1 && group + 1 < S::kGroups) expand(stage, group + 1, block);
      scale(stage, unit, w_skip);
    }
  }
};

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
      shared.free[i].init(kConsumers);  // one arrival a warp is no faster, and racecheck loses it
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
  Warpgroup<S> warpgroup;
  for (int index = 0; index < n_stages; ++index) {
    const int slot = index % kStages;
    shared.full[slot].wait(index / kStages % 2);
    const bool is_main = index < n_main;
    warpgroup.multiply(shared.stages[slot], is_main ? w_skip : b_skip, is_main ? x_skip : h_skip);
    shared.free[slot].arrive();
  }
  const auto each = [&](const auto& visit) {
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) {
      const int64_t row = tile * kTileRows + (warp / 4 * S::kBlocks + block) * 64 +
                          warp % 4 * kPanelRows + lane / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        each_sum(warpgroup.sums[block][half], row, segment.w.rows,
                 first_token + half * (S::kTokens / 2), job.rows, visit);
      }
    }
  };
  // One after the other, so that no load waits for the one before it; for the stream nobody waits.
  if (segment.accumulate) each([&](int64_t at, float& sum) { sum += segment.y[at]; });
  if (segment.y) each([&](int64_t at, float& sum) { segment.y[at] = sum; });
  if (segment.stream) each([&](int64_t at, float& sum) { atomicAdd(segment.stream + at, sum); });
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
