// packed_gemm - 4-bit linears for many tokens on the tensor cores, both components in one kernel,
// on any GPU from compute capability 8.0 on. Hopper's own is twin_gemm.cu.
//
// packed_gemm - y_s (+)= x' R_s^T + h_s' B_s^T for all linears s that read the same rounded x
// Shapes    R, B in fragment order (weights.h), x', h' rounded rows, y_s [m, out_s] f32
// Work      a block 128 rows of weights x 64 tokens; its 8 warps 32 rows x 32 tokens each. Columns
//           in stages of 128: codes of both sides and their scales arrive in shared memory by
//           cp.async, three stages deep. Weights are operand A, expanded from nibbles in registers
//           once a stage; tokens are operand B. Before Hopper, nibbles of both sides are multiplied
//           as they are (mma m16n8k64 of s4) where groups are of 64 columns and more: the words of
//           the fragment order are its operand A. The low-rank component is a few more stages of
//           the same loop: no second pass, no second write
// Memory    8 KB of weights and 8 KB of tokens a stage for 2^20 products: 128 operations a byte of
//           second-level cache. Bound: the issue of instructions. For each mma m16n8k32 pair (64
//           columns) a lane spends 4 x (FADD, FMUL, FFMA) on scales when groups are 64 columns
// Constants dots start at 1.5 * 2^23 as an integer: the int32 sum, read as a float, is then 1.5 *
//           2^23 + dot, exactly; one FADD in place of a conversion, which runs at an eighth of its
//           rate. 16 * dot of a stage is below 128 * 128 * 128 = 2^21
// Requires  groups of 2^n >= 32 columns or whole rows (weights.cpp, fits_fragments); rounded rows
//           allocated to a multiple of 128
// Error     dots exact; groups are added in the CPU's order, stages of groups over 128 columns one
//           by one: gamma_n_groups sum_g |scale dot|; tests/test_cuda_linears.cpp
// Source    the two components share input and output as in SVDQuant (Li et al. 2024)
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/mma.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStages = 3;
constexpr int kTileRows = 128, kTileTokens = 64;
constexpr int kWarpTokens = 32;
constexpr int kTilesTogether = 2;
constexpr int kPanels = kTileRows / kPanelRows;         // a set
constexpr int kTokenTile = kRowStep * kBlockCols / 16;  // 16-byte words from stage to stage
constexpr int kGroups = 4;                              // scales of a stage at most: groups of 32

struct Stage {
  uint4 weights[kPanels][2 * kWarp];           // [panel][half of 64 columns, lane]
  uint4 tokens[kTileTokens][8];                // as they lie in memory (code_offset)
  __half2 weight_scales[kGroups][kPanels][8];  // pairs of rows
  float token_scales[kGroups][kTileTokens];
};

// One side of the product, as one thread copies it: matrix and tokens over the same columns.
struct Source {
  const uint4 *weights, *tokens;  // the thread's first word
  const __half2* weight_scales;
  const float* token_scales;
  int w_shift, x_shift;

  __device__ Source(const FragmentView& w, const RoundedRows& x, int64_t set, int64_t first_token) {
    const int thread = threadIdx.x;
    weights = panel_codes(w, set * kPanels) + thread;
    tokens = reinterpret_cast<const uint4*>(x.codes) +
             first_token / kRowStep * (x.padded_cols / kBlockCols) * kTokenTile +
             first_token % kRowStep * 8 + thread;
    weight_scales = panel_scales(w, set * kPanels) + thread % 64 * 4;
    token_scales = x.scales + scale_offset(x, first_token, 0) + thread % 16 * 4;
    w_shift = w.group_shift;
    x_shift = x.group_shift;
  }

  // Columns [128 index, 128 index + 128).
  __device__ void load(Stage& stage, int index) const {
    const int thread = threadIdx.x;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      copy_async(&stage.weights[0][thread + i * kThreads],
                 weights + index * kSetCodes + i * kThreads);
      copy_async(&stage.tokens[0][thread + i * kThreads],
                 tokens + index * kTokenTile + i * kThreads);
    }
    // Scales of the groups that the stage touches, up to four a side: 16 words each.
    const int group = thread % 64 / 16;
    const int64_t col = index * kBlockCols;
    if (thread < 64 && group < kBlockCols >> min(w_shift, 7)) {
      copy_async(&stage.weight_scales[0][0][0] + thread * 4,
                 weight_scales + (col >> w_shift) * kSetScales);
    } else if (thread >= 64 && thread < 128 && group < kBlockCols >> min(x_shift, 7)) {
      copy_async(&stage.token_scales[group][thread % 16 * 4],
                 token_scales + ((col >> x_shift) + group) * kRowStep);
    }
  }
};

// All products of one stage. kInner: columns between two additions to the f32 sums: 32, 64, 128;
// kNibbles: both sides stay nibbles.
template <int kInner, bool kNibbles>
__device__ inline void multiply(const Stage& stage, int w_shift, int x_shift, int warp_row,
                                int warp_token, float (*sums)[kWarpTokens / 8][4]) {
  constexpr int kSteps = kBlockCols / 32, kScales = kBlockCols / kInner;
  const int lane = threadIdx.x % kWarp;
  static_assert(!kNibbles || kInner >= 64);
  uint4 words[2][kSteps / 2];
  uint32_t a[2][kSteps][4];  // words, expanded
  float2 w_scales[2][kScales];
#pragma unroll
  for (int panel = 0; panel < 2; ++panel) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      words[panel][half] = stage.weights[warp_row * 2 + panel][half * kWarp + lane];
      if (!kNibbles) expand_codes(words[panel][half], a[panel] + half * 2);
    }
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int group = i * kInner >> min(w_shift, 7);
      const float2 w = __half22float2(stage.weight_scales[group][warp_row * 2 + panel][lane / 4]);
      constexpr float kDot = kNibbles ? 1.0f : 0.0625f;  // expanded codes are 16 * code
      w_scales[panel][i] = make_float2(w.x * kDot, w.y * kDot);
    }
  }
  // A few tiles side by side: an mma waits some thirty clocks for the one before it in its chain.
#pragma unroll
  for (int first = 0; first < kWarpTokens / 8; first += kTilesTogether) {
    uint32_t b[kTilesTogether][kSteps][2];
    IntTile dots[kTilesTogether][2];
#pragma unroll
    for (int i = 0; i < kTilesTogether; ++i) {
      // Eight lanes an 8 x 16-byte matrix: the two halves of 32 columns, then those of the next 32.
      const int token = warp_token * kWarpTokens + (first + i) * 8 + lane % 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int word = half * 4 + lane / 8;
        load_matrices<false>(b[i][half * 2], &stage.tokens[token][word ^ (token & 7)]);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const bool begins = (kNibbles ? step / 2 * 64 : step * 32) % kInner == 0;
#pragma unroll
      for (int i = 0; i < kTilesTogether; ++i) {
#pragma unroll
        for (int panel = 0; panel < 2; ++panel) {
          const IntTile start = begins ? dots_start() : dots[i][panel];
          if (!kNibbles) {
            mma_s8(dots[i][panel], a[panel][step], b[i][step][0], b[i][step][1], start);
          } else if (step % 2 == 1) {
            mma_s4(dots[i][panel], words[panel][step / 2],
                   pack_nibbles(b[i][step - 1][0], b[i][step - 1][1]),
                   pack_nibbles(b[i][step][0], b[i][step][1]), start);
          }
        }
      }
      if ((step + 1) * 32 % kInner != 0) continue;
      const int scale = step * 32 / kInner;
      const float* by = stage.token_scales[scale * kInner >> min(x_shift, 7)] +
                        warp_token * kWarpTokens + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kTilesTogether; ++i) {
        const float2 x = *reinterpret_cast<const float2*>(by + (first + i) * 8);
#pragma unroll
        for (int panel = 0; panel < 2; ++panel) {
          add_scaled(dots[i][panel], w_scales[panel][scale], x, sums[panel][first + i]);
        }
      }
    }
  }
}

template <int kInner, bool kNibbles>
__global__ void __launch_bounds__(kThreads, 2)
    packed_gemm_kernel(const __grid_constant__ PackedJob job) {
  begin_kernel();
  extern __shared__ uint4 shared[];
  Stage* stages = reinterpret_cast<Stage*>(shared);
  int64_t tile = blockIdx.y;
  int which = 0;
  const auto n_tiles = [&](int i) { return (job.segments[i].w.rows + kTileRows - 1) / kTileRows; };
  while (tile >= n_tiles(which)) tile -= n_tiles(which++);
  const PackedSegment& segment = job.segments[which];
  const int64_t first_token = blockIdx.x * int64_t{kTileTokens};
  const Source main(segment.w, job.x, tile, first_token);
  const Source low_rank(segment.b, segment.h, tile, first_token);
  const int n_main = segment.n_blocks > 0 ? segment.n_blocks
                                          : static_cast<int>(segment.w.padded_cols / kBlockCols);
  const int n_stages = n_main + static_cast<int>(segment.b.padded_cols / kBlockCols);
  const auto load = [&](int index) {
    if (index < n_main) {
      main.load(stages[index % kStages], segment.first_block + index);
    } else if (index < n_stages) {
      low_rank.load(stages[index % kStages], index - n_main);
    }
    commit();
  };

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warp_row = warp % 4, warp_token = warp / 4;
  float sums[2][kWarpTokens / 8][4] = {};
  for (int i = 0; i < kStages - 1; ++i) load(i);
  for (int index = 0; index < n_stages; ++index) {
    wait_for<kStages - 2>();
    __syncthreads();  // everyone's part of the stage is there, and the oldest one is free
    load(index + kStages - 1);
    const Stage& stage = stages[index % kStages];
    if (index < n_main) {
      multiply<kInner, kNibbles>(stage, segment.w.group_shift, job.x.group_shift, warp_row,
                                 warp_token, sums);
    } else {
      multiply<kInner, kNibbles>(stage, segment.b.group_shift, segment.h.group_shift, warp_row,
                                 warp_token, sums);
    }
  }
#pragma unroll
  for (int panel = 0; panel < 2; ++panel) {
#pragma unroll
    for (int part = 0; part < kWarpTokens / 8; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = tile * kTileRows + warp_row * 32 + panel * 16 + lane / 4 + i / 2 * 8;
        const int64_t token =
            first_token + warp_token * kWarpTokens + part * 8 + lane % 4 * 2 + i % 2;
        if (row >= segment.w.rows || token >= job.rows) continue;
        store_output(segment, token, row, sums[panel][part][i]);
      }
    }
  }
}

}  // namespace

void launch_packed_gemm(const PackedJob& job, const Gpu& gpu) {
  TQ_CHECK(job.n_segments > 0 && job.n_segments <= kMaxLinears && job.x.order == CodeOrder::kTiles);
  if (job.rows == 0) return;
  int64_t n_tiles = 0;
  for (int i = 0; i < job.n_segments; ++i) {
    n_tiles += (job.segments[i].w.rows + kTileRows - 1) / kTileRows;
  }
  const int shift = std::min(7, smallest_group_shift(job));
  const dim3 grid(static_cast<unsigned>((job.rows + kTileTokens - 1) / kTileTokens),
                  static_cast<unsigned>(n_tiles));
  TQ_CHECK(n_tiles < 65536 && shift >= 5);
  bool nibbles = gpu.facts.major == 8 && job.x.nibbles;
  for (int i = 0; i < job.n_segments; ++i) {
    if (job.segments[i].b.n_panels > 0) nibbles &= job.segments[i].h.nibbles;
  }
  const auto kernel =
      shift == 7   ? nibbles ? packed_gemm_kernel<128, true> : packed_gemm_kernel<128, false>
        : shift == 6 ? nibbles ? packed_gemm_kernel<64, true> : packed_gemm_kernel<64, false>
                     : packed_gemm_kernel<32, false>;
  launch_kernel(gpu, "packed gemm", kernel, grid, dim3(kThreads), kStages * sizeof(Stage), job);
}

}  // namespace tq::cuda
