// packed_matvec - 4-bit linears for up to 16 tokens: weights stream through once, at the memory's
// speed.
//
// packed_matvec - y_s (+)= x' R_s^T + h_s' B_s^T for all linears s that read the same rounded x
// Shapes    R, B in fragment order (weights.h), x', h' rounded rows (m <= 16), y_s [m, out_s] f32
// Work      a block a panel of 16 rows; its 8 warps take every 8th block of 64 columns, of R, then
//           of B; sums of the warps are added through shared memory in a fixed order
// Memory    each code read once by one lane, 16 bytes at a time, four blocks asked for while four
//           are multiplied -> DRAM. x' comes from the second-level cache: 64 bytes a token and
//           block of 64 columns
// Constants 8 warps: a 4096-column panel is 8 blocks a warp, two rounds of loads. The weights are
//           operand A of mma m16n8k32, tokens are the 8 columns of B: the tensor cores do 8 tokens
//           in the time of one, so that 1 and 8 tokens cost the same
// Requires  m <= 16; groups of 2^n >= 32 columns or whole rows (weights.cpp, fits_fragments)
// Error     dots exact; groups are added in another order than the CPU's: gamma_n_groups
//           sum_g |scale dot|; tests/test_cuda_linears.cpp
// Source    kernels of Marlin (Frantar et al. 2024) for the offline fragment order
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/mma.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kWarps = 8;

// Where a lane stands: one matrix, one panel, its rows and its tokens.
template <int kTiles, bool kGroups32>
struct Stream {
  static constexpr int kScales = kGroups32 ? 2 : 1;  // of a block of 64 columns
  static constexpr int kUnroll = kTiles * kScales > 1 ? 2 : 4;

  const uint4* codes;     // + block / 2 * kSetCodes + block % 2 * 32
  const __half2* scales;  // + group * kSetScales
  const int8_t* x;        // of the lane's token, + block * 64
  const float* x_scales;  // of the lane's two tokens, + group * kRowStep
  int x_tile;             // from 8 tokens to the next 8
  int w_shift, x_shift;

  __device__ Stream(const FragmentView& w, const RoundedRows& rows, int64_t panel) {
    const int lane = threadIdx.x % kWarp;
    codes = panel_codes(w, panel) + lane;
    scales = panel_scales(w, panel) + lane / 4;
    x = reinterpret_cast<const int8_t*>(rows.codes) + lane / 4 * rows.padded_cols + lane % 4 * 16;
    x_scales = rows.scales + lane % 4 * 2;
    x_tile = static_cast<int>(8 * rows.padded_cols);
    w_shift = w.group_shift;
    x_shift = rows.group_shift;
  }

  // Everything that a few blocks need is asked for before the first of it is used.
  struct Loads {
    uint4 words[kUnroll], b[kUnroll][kTiles];
    __half2 w[kUnroll][kScales];
    float2 by[kUnroll][kScales][kTiles];
  };
  __device__ void load_weights(int first, int n_blocks, Loads& to) const {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      // Behind the end: any block, with codes 0.
      const bool inside = first + i * kWarps < n_blocks;
      const int block = inside ? first + i * kWarps : 0;
      to.words[i] = inside ? __ldcs(codes + (block >> 1) * kSetCodes + (block & 1) * kWarp)
                           : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int j = 0; j < kScales; ++j) {
        to.w[i][j] = scales[((block * 64 + j * 32) >> w_shift) * kSetScales];
      }
    }
  }
  /// What load_weights(warp, ...) leaves of a panel goes to the second-level cache.
  __device__ static void prefetch_rest(const FragmentView& w, int64_t panel) {
    constexpr int kLoaded = kWarps * kUnroll / 2, kLines = 8;  // blocks of 128 columns; in one
    const int n_lines = static_cast<int>(w.padded_cols / kBlockCols) * kLines;
    const uint4* codes = panel_codes(w, panel);
    for (int i = kLoaded * kLines + threadIdx.x; i < n_lines; i += kWarps * kWarp) {
      prefetch(codes + i / kLines * kSetCodes + i % kLines * 8);
    }
    const int first_group = static_cast<int>(kLoaded * kBlockCols >> w.group_shift);
    for (int i = first_group + threadIdx.x; i < w.n_groups; i += kWarps * kWarp) {
      prefetch(panel_scales(w, panel) + i * kSetScales);
    }
  }
  __device__ void load_tokens(int first, int n_blocks, Loads& to) const {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int block = first + i * kWarps < n_blocks ? first + i * kWarps : 0;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        to.b[i][tile] = *reinterpret_cast<const uint4*>(x + tile * x_tile + block * 64);
#pragma unroll
        for (int j = 0; j < kScales; ++j) {
          const int group = (block * 64 + j * 32) >> x_shift;
          to.by[i][j][tile] = *reinterpret_cast<const float2*>(
              x_scales + group * static_cast<int>(kRowStep) + tile * 8);
        }
      }
    }
  }
  __device__ void load(int first, int n_blocks, Loads& to) const {
    load_weights(first, n_blocks, to);
    load_tokens(first, n_blocks, to);
  }

  __device__ static void multiply(const Loads& from, float (*sums)[4]) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      uint32_t a[2][4];
      expand_codes(from.words[i], a);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4& b = from.b[i][tile];
        IntTile dots;
        mma_s8(dots, a[0], b.x, b.y, dots_start());
        if constexpr (kGroups32) scale(from, i, 0, tile, dots, sums[tile]);
        mma_s8(dots, a[1], b.z, b.w, kGroups32 ? dots_start() : dots);
        scale(from, i, kScales - 1, tile, dots, sums[tile]);
      }
    }
  }
  __device__ static void scale(const Loads& from, int i, int j, int tile, const IntTile& dots,
                               float* sums) {
    const float2 w = __half22float2(from.w[i][j]);
    const float2 sixteenth = make_float2(w.x * 0.0625f, w.y * 0.0625f);  // dots are 16 * dot
    add_scaled(dots, sixteenth, from.by[i][j][tile], sums);
  }

  /// The warp's blocks, every kWarps-th. loads[0] holds the weights of the first ones already.
  __device__ void run(int n_blocks, Loads (&loads)[2], float (*sums)[4]) const {
    const int warp = threadIdx.x / kWarp;
    load_tokens(warp, n_blocks, loads[0]);
    constexpr int kStep = kWarps * kUnroll;
    for (int first = warp; first < n_blocks; first += 2 * kStep) {
      if (first + kStep < n_blocks) load(first + kStep, n_blocks, loads[1]);
      multiply(loads[0], sums);
      if (first + kStep >= n_blocks) break;
      if (first + 2 * kStep < n_blocks) load(first + 2 * kStep, n_blocks, loads[0]);
      multiply(loads[1], sums);
    }
  }
};

template <int kTiles, bool kGroups32>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    packed_matvec_kernel(const __grid_constant__ PackedJob job, int first_wave) {
  int64_t panel = blockIdx.x;
  int which = 0;
  while (panel >= job.segments[which].w.n_panels) panel -= job.segments[which++].w.n_panels;
  const PackedSegment& segment = job.segments[which];
  float sums[kTiles][4] = {};
  using Columns = Stream<kTiles, kGroups32>;
  typename Columns::Loads loads[2];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  // Blocks of columns that hold something; the padding behind is zero.
  const int n_blocks = static_cast<int>(segment.w.cols + 63) / 64;
  const Columns residual(segment.w, job.x, panel);
  residual.load_weights(warp, n_blocks, loads[0]);
  // The blocks that wait for the kernel ahead use the time, in which the memory would be idle.
  if (blockIdx.x < first_wave) Columns::prefetch_rest(segment.w, panel);
  begin_kernel();
  residual.run(n_blocks, loads, sums);
  if (segment.b.n_panels > 0) {
    const int n_more = static_cast<int>(segment.b.cols + 63) / 64;
    const Columns low_rank(segment.b, segment.h, panel);
    low_rank.load_weights(warp, n_more, loads[0]);
    low_rank.run(n_more, loads, sums);
  }
  // [warp][token][row]; 17 columns keep the stores of a warp apart.
  __shared__ float shared[kWarps][kTiles * 8][kPanelRows + 1];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      shared[warp][tile * 8 + lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8] = sums[tile][i];
    }
  }
  __syncthreads();
  const int row_in_panel = threadIdx.x % kPanelRows, token = threadIdx.x / kPanelRows;
  const int64_t row = panel * kPanelRows + row_in_panel;
  if (token >= job.rows || token >= kTiles * 8 || row >= segment.w.rows) return;
  float sum = shared[0][token][row_in_panel];
  for (int i = 1; i < kWarps; ++i) sum += shared[i][token][row_in_panel];
  store_output(segment, token, row, sum);
}

}  // namespace

void launch_packed_matvec(const PackedJob& job, const Gpu& gpu) {
  TQ_CHECK(job.rows <= kMatvecRows && job.x.order == CodeOrder::kLanes && job.n_segments > 0 &&
           job.n_segments <= kMaxLinears);
  if (job.rows == 0) return;
  int64_t n_panels = 0;
  for (int i = 0; i < job.n_segments; ++i) n_panels += job.segments[i].w.n_panels;
  const bool groups32 = smallest_group_shift(job) < 6;
  const auto kernel =
      job.rows <= 8 ? groups32 ? packed_matvec_kernel<1, true> : packed_matvec_kernel<1, false>
      : groups32 ? packed_matvec_kernel<2, true>
                    : packed_matvec_kernel<2, false>;
  launch_kernel(gpu, "packed matvec", kernel, dim3(static_cast<unsigned>(n_panels)),
                dim3(kWarps * kWarp), 0, job, 2 * gpu.facts.n_sms);
}

}  // namespace tq::cuda
