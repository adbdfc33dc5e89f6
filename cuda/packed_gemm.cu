// packed_gemm - 4-bit linears for many tokens on the tensor cores, both components in one kernel.
//
// packed_gemm - y_s (+)= x' R_s^T + h_s' B_s^T for all linears s that read the same rounded x
// Shapes    R, B in fragment order (weights.h), x', h' rounded rows, y_s [m, out_s] f32
// Work      a block 128 rows of weights x 128 tokens; its 8 warps 32 rows x 64 tokens each. Columns
//           in stages of 128: codes of both sides and their scales arrive in shared memory by
//           cp.async, three stages deep. Weights are operand A, expanded from nibbles in registers
//           once a stage; tokens are operand B, 16 bytes a lane. The low-rank component is a few
//           more stages of the same loop: no second pass, no second write
// Memory    8 KB of weights and 16 KB of tokens a stage for 128^3 products: 87 operations a byte of
//           second-level cache. Bound: the issue of instructions. For each mma m16n8k32 pair (64
//           columns) a lane spends 4 x (FADD, FMUL, FFMA) on scales when groups are 64 columns
// Constants dots start at 1.5 * 2^23 as an integer: the int32 sum, read as a float, is then 1.5 *
//           2^23 + dot, exactly; one FADD in place of a conversion, which runs at an eighth of its
//           rate. 16 * dot of a stage is below 128 * 128 * 128 = 2^21
// Requires  groups of 32, 64 or a multiple of 128 (weights.cpp, fits_fragments); rounded rows
//           allocated to a multiple of 128
// Error     dots exact; groups are added in the CPU's order, stages of groups over 128 columns one
//           by one: gamma_n_groups sum_g |scale dot|; tests/test_cuda_ops.cpp
// Source    the two components share input and output as in SVDQuant (Li et al. 2024)
#include "cuda/device.cuh"
#include "cuda/mma.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStages = 3;
constexpr int kTileRows = 128, kTileTokens = 128;
constexpr int kWarpTokens = 64;
constexpr int kPanels = kTileRows / kPanelRows;
constexpr int kGroups = 4;  // scales of a stage at most: groups of 32

struct Stage {
  uint4 weights[kPanels][2 * kWarp];           // [panel][half of 64 columns, lane]
  uint4 tokens[kTileTokens][8];                // 128 codes a token, 16-byte words swizzled
  __half2 weight_scales[kPanels][kGroups][8];  // pairs of rows
  float token_scales[kGroups][kTileTokens];
};

// One side of the product: matrix and tokens, both over the same columns.
struct Operands {
  const FragmentView& w;
  const RoundedRows& x;
  int64_t first_panel, first_token;

  __device__ int n_stages() const { return static_cast<int>(w.padded_cols / kBlockCols); }

  __device__ void load(Stage& stage, int index) const {
    const int thread = threadIdx.x;
    const int64_t col = int64_t{index} * kBlockCols;
    for (int i = thread; i < kPanels * 2 * kWarp; i += kThreads) {
      const int panel = i / (2 * kWarp), word = i % (2 * kWarp);
      copy_async(
          &stage.weights[panel][word],
          w.codes + ((first_panel + panel) * (w.padded_cols / 64) + 2 * index) * kWarp + word);
    }
    for (int i = thread; i < kTileTokens * 8; i += kThreads) {
      const int token = i / 8, word = i % 8;
      // Two tokens that a quarter of a warp reads together differ in the lowest bit.
      copy_async(&stage.tokens[token][word ^ (token & 1) * 4],
                 x.codes + (first_token + token) * x.padded_cols + col + word * 16);
    }
    // Scales: those of the groups that the stage touches, at most one for 32 columns.
    const int w_groups = scales_of(w.group), x_groups = scales_of(x.group);
    const int n_w = w_groups * kPanels * 2, n_x = x_groups * (kTileTokens / 4);
    for (int i = thread; i < n_w + n_x; i += kThreads) {
      if (i < n_w) {
        const int half = i % 2, panel = i / 2 % kPanels, group = i / 2 / kPanels;
        const int64_t at = min(col / w.group + group, int64_t{w.n_groups} - 1);
        copy_async(&stage.weight_scales[panel][group][half * 4],
                   w.scales + ((first_panel + panel) * w.n_groups + at) * 8 + half * 4);
      } else {
        const int four = (i - n_w) % (kTileTokens / 4), group = (i - n_w) / (kTileTokens / 4);
        const int64_t last = (w.cols - 1) / x.group;
        const int64_t at = min(col / x.group + group, last);
        copy_async(&stage.token_scales[group][four * 4],
                   x.scales + at * x.stride + first_token + four * 4);
      }
    }
  }
  __device__ static int scales_of(int group) {
    return group >= kBlockCols ? 1 : kBlockCols / group;
  }
};

// acc += scale * dot for a tile of 16 rows x 8 tokens; the dots begin anew.
__device__ inline void promote(IntTile& dots, float2 w, float2 x, float* sums) {
  const float by[4] = {w.x * x.x, w.x * x.y, w.y * x.x, w.y * x.y};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sums[i] = fmaf(__int_as_float(dots.at[i]) - kRoundMagic, by[i], sums[i]);
    dots.at[i] = kRoundMagicBits;
  }
}

// All products of one stage. kInner: columns between two promotions: 32, 64 or 128.
template <int kInner>
__device__ inline void multiply(const Stage& stage, int w_group, int x_group, int warp_row,
                                int warp_token, float (*sums)[kWarpTokens / 8][4]) {
  constexpr int kSteps = kBlockCols / 32, kScales = kBlockCols / kInner;
  const int lane = threadIdx.x % kWarp;
  // Groups of the two sides differ: index of the scale that covers promotion i.
  const int w_step = w_group >= kBlockCols ? 0 : w_group,
            x_step = x_group >= kBlockCols ? 0 : x_group;
  uint32_t a[2][kSteps][4];
  float2 w_scales[2][kScales];
#pragma unroll
  for (int panel = 0; panel < 2; ++panel) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 words = stage.weights[warp_row * 2 + panel][half * kWarp + lane];
      uint32_t* first = a[panel][half * 2];
      uint32_t* second = a[panel][half * 2 + 1];
      first[0] = low_nibbles(words.x), first[1] = low_nibbles(words.y);
      first[2] = high_nibbles(words.x), first[3] = high_nibbles(words.y);
      second[0] = low_nibbles(words.z), second[1] = low_nibbles(words.w);
      second[2] = high_nibbles(words.z), second[3] = high_nibbles(words.w);
    }
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int group = w_step ? i * kInner / w_step : 0;
      const float2 w = __half22float2(stage.weight_scales[warp_row * 2 + panel][group][lane / 4]);
      w_scales[panel][i] = make_float2(w.x * 0.0625f, w.y * 0.0625f);  // dots hold 16 * dot
    }
  }
#pragma unroll
  for (int tile = 0; tile < kWarpTokens / 8; ++tile) {
    const int token = warp_token * kWarpTokens + tile * 8 + lane / 4;
    const int swizzle = (token & 1) * 4;
    const uint4 b_low = stage.tokens[token][lane % 4 ^ swizzle];
    const uint4 b_high = stage.tokens[token][4 + lane % 4 ^ swizzle];
    const uint32_t b[kSteps][2] = {
        {b_low.x, b_low.y}, {b_low.z, b_low.w}, {b_high.x, b_high.y}, {b_high.z, b_high.w}};
    IntTile dots[2];
#pragma unroll
    for (int panel = 0; panel < 2; ++panel) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dots[panel].at[i] = kRoundMagicBits;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        const uint32_t* at = a[panel][step];
        mma_s8(dots[panel], at[0], at[1], at[2], at[3], b[step][0], b[step][1]);
      }
      if ((step + 1) * 32 % kInner != 0) continue;
      const int i = (step + 1) * 32 / kInner - 1;
      const int group = x_step ? i * kInner / x_step : 0;
      const float2 x = *reinterpret_cast<const float2*>(
          &stage.token_scales[group][warp_token * kWarpTokens + tile * 8 + lane % 4 * 2]);
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        promote(dots[panel], w_scales[panel][i], x, sums[panel][tile]);
      }
    }
  }
}

template <int kInner>
__global__ void __launch_bounds__(kThreads, 1)
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
  const Operands main = {segment.w, job.x, tile * kPanels, first_token};
  const Operands low_rank = {segment.b, segment.h, tile * kPanels, first_token};
  const int n_main = main.n_stages();
  const int n_stages = n_main + (segment.b.n_panels > 0 ? low_rank.n_stages() : 0);
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
      multiply<kInner>(stage, segment.w.group, job.x.group, warp_row, warp_token, sums);
    } else if (min(segment.b.group, segment.h.group) >= 64) {
      multiply<64>(stage, segment.b.group, segment.h.group, warp_row, warp_token, sums);
    } else {
      multiply<32>(stage, segment.b.group, segment.h.group, warp_row, warp_token, sums);
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
        float& y = segment.y[token * segment.w.rows + row];
        y = segment.accumulate ? y + sums[panel][part][i] : sums[panel][part][i];
      }
    }
  }
}

}  // namespace

void launch_packed_gemm(const PackedJob& job, const Gpu& gpu) {
  TQ_CHECK(job.n_segments > 0 && job.n_segments <= kMaxLinears);
  if (job.rows == 0) return;
  int64_t n_tiles = 0;
  int inner = kBlockCols;
  for (int i = 0; i < job.n_segments; ++i) {
    n_tiles += (job.segments[i].w.rows + kTileRows - 1) / kTileRows;
    inner = std::min({inner, job.segments[i].w.group, job.x.group});
  }
  const dim3 grid(static_cast<unsigned>((job.rows + kTileTokens - 1) / kTileTokens),
                  static_cast<unsigned>(n_tiles));
  TQ_CHECK(n_tiles < 65536 && inner >= 32);
  const auto kernel = inner >= 128  ? packed_gemm_kernel<128>
                      : inner >= 64 ? packed_gemm_kernel<64>
                                    : packed_gemm_kernel<32>;
  launch_kernel(gpu, "packed gemm", kernel, grid, dim3(kThreads), kStages * sizeof(Stage), job);
}

}  // namespace tq::cuda
