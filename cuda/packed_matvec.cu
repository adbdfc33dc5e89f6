// packed_matvec - 4-bit linears for up to 16 tokens: weights stream through once, at the memory's
// speed.
//
// packed_matvec - y_s (+)= x' R_s^T + h_s' B_s^T for all linears s that read the same rounded x
// Shapes    R, B in fragment order (weights.h), x', h' rounded rows (m <= 16), y_s [m, out_s] f32
// Work      a block a panel of 16 rows; its 8 warps take every 8th block of 64 columns, of R, then
//           of B; sums of the warps are added through shared memory in a fixed order
// Memory    each code read once by one lane, 16 bytes at a time, 4 loads in flight a lane -> DRAM.
//           x' comes from the second-level cache: 64 bytes a token and block of 64 columns
// Constants 8 warps: a 4096-column panel is 8 blocks a warp, two rounds of loads. The weights are
//           operand A of mma m16n8k32, tokens are the 8 columns of B: the tensor cores do 8 tokens
//           in the time of one, so that 1 and 8 tokens cost the same
// Requires  m <= 16; groups of 32, 64 or a multiple of 128 (weights.cpp, fits_fragments)
// Error     dots exact; groups are added in another order than the CPU's: gamma_n_groups
//           sum_g |scale dot|; tests/test_cuda_ops.cpp
// Source    kernels of Marlin (Frantar et al. 2024) for the offline fragment order
#include "cuda/device.cuh"
#include "cuda/mma.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kUnroll = 4;

// Adds dot * scale to the f32 sums of a tile and clears the dots. Dots hold 16 * the true value.
__device__ inline void promote(IntTile& dots, float2 w, float2 x, float* sums) {
  const float values[4] = {w.x * x.x, w.x * x.y, w.y * x.x, w.y * x.y};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sums[i] = fmaf(static_cast<float>(dots.at[i]), values[i] * 0.0625f, sums[i]);
    dots.at[i] = 0;
  }
}

// Where the warp stands: one matrix, one panel, one lane.
template <int kTiles>
struct Stream {
  const uint4* codes;     // + block * 32
  const __half2* scales;  // + group * 8
  const int8_t* x;        // of the lane's token, + block * 64
  const float* x_scales;  // of the lane's two tokens, + group * stride
  int64_t x_tile;         // from a tile of 8 tokens to the next
  int64_t stride;
  int w_group, x_group;

  __device__ Stream(const FragmentView& w, const RoundedRows& rows, int64_t panel) {
    const int lane = threadIdx.x % kWarp;
    codes = w.codes + panel * (w.padded_cols / 64) * kWarp + lane;
    scales = w.scales + panel * w.n_groups * 8 + lane / 4;
    x = rows.codes + lane / 4 * rows.padded_cols + lane % 4 * 16;
    x_scales = rows.scales + lane % 4 * 2;
    x_tile = 8 * rows.padded_cols;
    stride = rows.stride;
    w_group = w.group;
    x_group = rows.group;
  }

  // Columns [64 block + first, ...) of all tiles, one scale.
  __device__ void scaled(int64_t col, IntTile* dots, float (*sums)[4]) const {
    const float2 w = __half22float2(scales[col / w_group * 8]);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float2 by =
          *reinterpret_cast<const float2*>(x_scales + col / x_group * stride + tile * 8);
      promote(dots[tile], w, by, sums[tile]);
    }
  }

  __device__ void run_block(int64_t block, const uint4& words, float (*sums)[4]) const {
    IntTile dots[kTiles] = {};
    uint4 b[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      b[tile] = *reinterpret_cast<const uint4*>(x + tile * x_tile + block * 64);
      mma_s8(dots[tile], low_nibbles(words.x), low_nibbles(words.y), high_nibbles(words.x),
             high_nibbles(words.y), b[tile].x, b[tile].y);
    }
    if (w_group < 64 || x_group < 64) scaled(block * 64, dots, sums);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      mma_s8(dots[tile], low_nibbles(words.z), low_nibbles(words.w), high_nibbles(words.z),
             high_nibbles(words.w), b[tile].z, b[tile].w);
    }
    scaled(block * 64 + 32, dots, sums);
  }

  __device__ void run(int64_t n_blocks, float (*sums)[4]) const {
    const int64_t warp = threadIdx.x / kWarp;
    for (int64_t block = warp; block < n_blocks; block += kWarps * kUnroll) {
      uint4 words[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int64_t at = block + i * kWarps;
        if (at < n_blocks) words[i] = __ldcs(codes + at * kWarp);
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int64_t at = block + i * kWarps;
        if (at < n_blocks) run_block(at, words[i], sums);
      }
    }
  }
};

template <int kTiles>
__global__ void __launch_bounds__(kWarps* kWarp)
    packed_matvec_kernel(const __grid_constant__ PackedJob job) {
  begin_kernel();
  int64_t panel = blockIdx.x;
  int which = 0;
  while (panel >= job.segments[which].w.n_panels) panel -= job.segments[which++].w.n_panels;
  const PackedSegment& segment = job.segments[which];
  float sums[kTiles][4] = {};
  // Blocks of columns that hold something; the padding behind is zero.
  Stream<kTiles>(segment.w, job.x, panel).run((segment.w.cols + 63) / 64, sums);
  if (segment.b.n_panels > 0) {
    Stream<kTiles>(segment.b, segment.h, panel).run((segment.b.cols + 63) / 64, sums);
  }
  // [warp][token][row]; 17 columns keep the stores of a warp apart.
  __shared__ float shared[kWarps][kTiles * 8][kPanelRows + 1];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
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
  float& y = segment.y[token * segment.w.rows + row];
  y = segment.accumulate ? y + sum : sum;
}

}  // namespace

void launch_packed_matvec(const PackedJob& job, const Gpu& gpu) {
  TQ_CHECK(job.rows <= kMatvecRows && job.n_segments > 0 && job.n_segments <= kMaxLinears);
  if (job.rows == 0) return;
  int64_t n_panels = 0;
  for (int i = 0; i < job.n_segments; ++i) n_panels += job.segments[i].w.n_panels;
  launch_kernel(gpu, "packed matvec",
                job.rows <= 8 ? packed_matvec_kernel<1> : packed_matvec_kernel<2>,
                dim3(static_cast<unsigned>(n_panels)), dim3(kWarps * kWarp), 0, job);
}

}  // namespace tq::cuda
