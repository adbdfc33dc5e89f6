// packed_gemm - 4-bit linears for many tokens on the tensor cores, both components in one kernel.
//
// packed_gemm - y_s (+)= x' R_s^T + h_s' B_s^T for all linears s that read the same rounded x
// Shapes    R, B in fragment order (weights.h), x', h' rounded rows, y_s [m, out_s] f32
// Work      a block 128 rows of weights x 64 tokens; its 8 warps 32 rows x 32 tokens each. Columns
//           in stages of 128: codes of both sides and their scales arrive in shared memory by
//           cp.async, three stages deep. Weights are operand A, expanded from nibbles in registers
//           once a stage; tokens are operand B, 16 bytes a lane. The low-rank component is a few
//           more stages of the same loop: no second pass, no second write
// Memory    8 KB of weights and 8 KB of tokens a stage for 2^20 products: 128 operations a byte of
//           second-level cache. Bound: the issue of instructions. For each mma m16n8k32 pair (64
//           columns) a lane spends 4 x (FADD, FMUL, FFMA) on scales when groups are 64 columns
// Constants dots start at 1.5 * 2^23 as an integer: the int32 sum, read as a float, is then 1.5 *
//           2^23 + dot, exactly; one FADD in place of a conversion, which runs at an eighth of its
//           rate. 16 * dot of a stage is below 128 * 128 * 128 = 2^21
// Requires  groups of 2^n >= 32 columns or whole rows (weights.cpp, fits_fragments); rounded rows
//           allocated to a multiple of 128
// Error     dots exact; groups are added in the CPU's order, stages of groups over 128 columns one
//           by one: gamma_n_groups sum_g |scale dot|; tests/test_cuda_ops.cpp
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
constexpr int kPanels = kTileRows / kPanelRows;
constexpr int kGroups = 4;  // scales of a stage at most: groups of 32

struct Stage {
  uint4 weights[kPanels][2 * kWarp];           // [panel][half of 64 columns, lane]
  uint4 tokens[kTileTokens][8];                // 128 codes a token, 16-byte words swizzled
  __half2 weight_scales[kPanels][kGroups][8];  // pairs of rows
  float token_scales[kGroups][kTileTokens];
};

// One side of the product, as one thread copies it: matrix and tokens over the same columns.
struct Source {
  const uint4 *weights, *tokens;  // the thread's first word; + stage * step
  int64_t weight_step;            // from half of the panels to the other
  int64_t token_step;             // from half of the tokens to the other
  const __half2* weight_scales;   // + group * 8
  const float* token_scales;      // + group * stride
  int64_t stride;
  int w_shift, x_shift, last_group;

  __device__ Source(const FragmentView& w, const RoundedRows& x, int64_t first_panel,
                    int64_t first_token) {
    const int thread = threadIdx.x;
    const int64_t words = w.padded_cols / 64 * kWarp;  // of a panel
    weights = w.codes + (first_panel + thread / 64) * words + thread % 64;
    weight_step = 4 * words;
    tokens = reinterpret_cast<const uint4*>(x.codes) +
             (first_token + thread / 8) * (x.padded_cols / 16) + thread % 8;
    token_step = 32 * (x.padded_cols / 16);
    weight_scales =
        w.scales + (first_panel + thread / 2 % kPanels) * w.n_groups * 8 + thread % 2 * 4;
    token_scales = x.scales + first_token + thread % 16 * 4;
    stride = x.stride;
    w_shift = w.group_shift;
    x_shift = x.group_shift;
    last_group = static_cast<int>(w.cols - 1);
  }

  // Columns [128 index, 128 index + 128).
  __device__ void load(Stage& stage, int index) const {
    const int thread = threadIdx.x;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      copy_async(&stage.weights[thread / 64 + 4 * i][thread % 64],
                 weights + i * weight_step + index * 2 * kWarp);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Two tokens that a quarter of a warp reads together differ in the lowest bit.
      const int token = thread / 8 + 32 * i;
      copy_async(&stage.tokens[token][thread % 8 ^ (token & 1) * 4],
                 tokens + i * token_step + index * 8);
    }
    // Scales of the groups that the stage touches: up to four a side, 16 words each.
    if (thread < 64) {
      const int group = thread / 16, col = index * kBlockCols + (group << min(w_shift, 7));
      if (group < kBlockCols >> min(w_shift, 7)) {
        copy_async(&stage.weight_scales[thread / 2 % kPanels][group][thread % 2 * 4],
                   weight_scales + (min(col, last_group) >> w_shift) * 8);
      }
    } else if (thread < 128) {
      const int group = thread / 16 - 4, col = index * kBlockCols + (group << min(x_shift, 7));
      if (group < kBlockCols >> min(x_shift, 7)) {
        copy_async(&stage.token_scales[group][thread % 16 * 4],
                   token_scales + (min(col, last_group) >> x_shift) * stride);
      }
    }
  }
};

// All products of one stage. kInner: columns between two additions to the f32 sums: 32, 64, 128.
template <int kInner>
__device__ inline void multiply(const Stage& stage, int w_shift, int x_shift, int warp_row,
                                int warp_token, float (*sums)[kWarpTokens / 8][4]) {
  constexpr int kSteps = kBlockCols / 32, kScales = kBlockCols / kInner;
  const int lane = threadIdx.x % kWarp;
  uint32_t a[2][kSteps][4];
  float2 w_scales[2][kScales];
#pragma unroll
  for (int panel = 0; panel < 2; ++panel) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      expand_codes(stage.weights[warp_row * 2 + panel][half * kWarp + lane], a[panel] + half * 2);
    }
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int group = i * kInner >> min(w_shift, 7);
      const float2 w = __half22float2(stage.weight_scales[warp_row * 2 + panel][group][lane / 4]);
      w_scales[panel][i] = make_float2(w.x * 0.0625f, w.y * 0.0625f);  // dots are 16 * dot
    }
  }
  // A few tiles side by side: an mma waits some thirty clocks for the one before it in its chain.
#pragma unroll
  for (int first = 0; first < kWarpTokens / 8; first += kTilesTogether) {
    uint32_t b[kTilesTogether][kSteps][2];
    IntTile dots[kTilesTogether][2];
#pragma unroll
    for (int i = 0; i < kTilesTogether; ++i) {
      const int token = warp_token * kWarpTokens + (first + i) * 8 + lane / 4;
      const int swizzle = (token & 1) * 4;
      const uint4 low = stage.tokens[token][lane % 4 ^ swizzle];
      const uint4 high = stage.tokens[token][(4 + lane % 4) ^ swizzle];
      b[i][0][0] = low.x, b[i][0][1] = low.y, b[i][1][0] = low.z, b[i][1][1] = low.w;
      b[i][2][0] = high.x, b[i][2][1] = high.y, b[i][3][0] = high.z, b[i][3][1] = high.w;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const bool begins = step * 32 % kInner == 0;
#pragma unroll
      for (int i = 0; i < kTilesTogether; ++i) {
#pragma unroll
        for (int panel = 0; panel < 2; ++panel) {
          mma_s8(dots[i][panel], a[panel][step], b[i][step][0], b[i][step][1],
                 begins ? dots_start() : dots[i][panel]);
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

template <int kInner>
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
  const Source main(segment.w, job.x, tile * kPanels, first_token);
  const Source low_rank(segment.b, segment.h, tile * kPanels, first_token);
  const int n_main = static_cast<int>(segment.w.padded_cols / kBlockCols);
  const int n_stages = n_main + static_cast<int>(segment.b.padded_cols / kBlockCols);
  const auto load = [&](int index) {
    if (index < n_main) {
      main.load(stages[index % kStages], index);
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
      multiply<kInner>(stage, segment.w.group_shift, job.x.group_shift, warp_row, warp_token, sums);
    } else {
      multiply<kInner>(stage, segment.b.group_shift, segment.h.group_shift, warp_row, warp_token,
                       sums);
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
  TQ_CHECK(job.n_segments > 0 && job.n_segments <= kMaxLinears);
  if (job.rows == 0) return;
  int64_t n_tiles = 0;
  int shift = 7;  // of the smallest group
  for (int i = 0; i < job.n_segments; ++i) {
    n_tiles += (job.segments[i].w.rows + kTileRows - 1) / kTileRows;
    shift = std::min({shift, job.segments[i].w.group_shift, job.x.group_shift});
    if (job.segments[i].b.n_panels == 0) continue;
    shift = std::min({shift, job.segments[i].b.group_shift, job.segments[i].h.group_shift});
  }
  const dim3 grid(static_cast<unsigned>((job.rows + kTileTokens - 1) / kTileTokens),
                  static_cast<unsigned>(n_tiles));
  TQ_CHECK(n_tiles < 65536 && shift >= 5);
  const auto kernel = shift == 7   ? packed_gemm_kernel<128>
                      : shift == 6 ? packed_gemm_kernel<64>
                                   : packed_gemm_kernel<32>;
  launch_kernel(gpu, "packed gemm", kernel, grid, dim3(kThreads), kStages * sizeof(Stage), job);
}

}  // namespace tq::cuda
