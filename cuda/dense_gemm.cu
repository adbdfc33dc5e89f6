// dense_gemm - products of many rows with weights that meet f32 inputs, by mma.sync on tensor
// cores: unquantized models, packed matrices whose input is not rounded, the head.
//
// dense_gemm - y_s (+)= x W_s^T for linears s that read the same x
// Shapes    W_s [out_s, in] in the file's layout, any storage; x [m, in], y_s [m, out_s] f32
// Work      a block 128 rows of W x 128 rows of x, 32 columns at a time. Its threads load them,
//           split them into bf16 parts (dense_columns.cuh) and store those to shared memory, while
//           the columns before are multiplied; a warp has 64 x 32 outputs. f32 x bf16 takes two
//           products of parts, all else three
// Memory    64 KB for two stages. W and x come from the second-level cache, 16 KB of x and 8 KB of
//           bf16 weights for 2^19 products
// Constants two blocks a multiprocessor where shared memory has room: 64 sums a thread, 24
// registers
//           of columns under way and 20 of operands, of 128; 2 to 16 more are spilled
// Requires  sm_80; tails are guarded
// Error     dense_columns.cuh, and one f32 sum of `in` products in another order than the CPU's:
//           (3 * 2^-18 + gamma_(in + 2)) |x||w|, gamma_n = n 2^-24 / (1 - n 2^-24);
//           tests/test_cuda_linears.cpp
#include "cuda/dense_columns.cuh"
#include "cuda/device.cuh"
#include "cuda/mma.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kTile = 128, kCols = 32, kThreads = 256;
constexpr int kTileBytes = kTile * 128, kStageBytes = 2 * kTileBytes;

template <Storage kStorage, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    dense_gemm_kernel(const __grid_constant__ DenseJob job) {
  extern __shared__ __align__(128) uint8_t stages[];  // [2][W, x]
  using Weights = Tile<kStorage, kAligned, kTile, kCols, kThreads>;
  using Inputs = Tile<Storage::kF32, kAligned, kTile, kCols, kThreads>;
  begin_kernel();
  int64_t tile = blockIdx.y;
  const DenseSegment& segment = segment_of(job, tile, kTile);
  const CanonicalView x = rows_view(job.x, job.rows, segment.w.cols);
  const int64_t first_row = tile * kTile, first_token = blockIdx.x * int64_t{kTile};
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_row = warp / 4 * 64, warp_token = warp % 4 * 32;
  float sums[4][4][4] = {};  // 16 rows, 8 tokens, as mma_bf16 has them
  Weights weights(segment.w, first_row, threadIdx.x);
  Inputs inputs(x, first_token, threadIdx.x);
  const auto load = [&](int col) {
    weights.load(col);
    inputs.load(col);
  };
  const auto store = [&](int stage) {
    weights.store(stages + stage * kStageBytes);
    inputs.store(stages + stage * kStageBytes + kTileBytes);
  };
  load(0);
  store(0);
  __syncthreads();
  const int cols = static_cast<int>(segment.w.cols);
  for (int col = 0, stage = 0; col < cols; col += kCols, stage ^= 1) {
    const bool more = col + kCols < cols;
    if (more) load(col + kCols);
    const uint8_t* w_tile = stages + stage * kStageBytes;
    const uint8_t* x_tile = w_tile + kTileBytes;
#pragma unroll
    for (int step = 0; step < kCols / 16; ++step) {
      uint32_t tokens[2][4][2];  // [part][8 tokens]
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const int row = warp_token + i * 8 + lane / 16 * 8 + lane % 8;
          load_matrices<false>(tokens[part][i],
                               x_tile + Inputs::offset(part, row, step * 2 + lane / 8 % 2));
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int w_part = Weights::kParts - 1; w_part >= 0; --w_part) {
          uint32_t a[4];
          const int row = warp_row + i * 16 + lane % 16;
          load_matrices<false>(a, w_tile + Weights::offset(w_part, row, step * 2 + lane / 16));
#pragma unroll
          for (int x_part = 1 - w_part; x_part >= 0; --x_part) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              mma_bf16(sums[i][j], a, tokens[x_part][j][0], tokens[x_part][j][1]);
            }
          }
        }
      }
    }
    if (more) store(stage ^ 1);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t row = first_row + warp_row + i * 16 + lane / 4 + k / 2 * 8;
        const int64_t token = first_token + warp_token + j * 8 + lane % 4 * 2 + k % 2;
        if (row >= segment.w.rows || token >= job.rows) continue;
        float& y = segment.y[token * segment.w.rows + row];
        y = job.accumulate ? y + sums[i][j][k] : sums[i][j][k];
      }
    }
  }
}

template <Storage kStorage>
void launch_storage(const DenseJob& job, const Gpu& gpu) {
  const auto kernel =
      rows_aligned(job, 8) ? dense_gemm_kernel<kStorage, true> : dense_gemm_kernel<kStorage, false>;
  const dim3 grid(static_cast<unsigned>((job.rows + kTile - 1) / kTile),
                  static_cast<unsigned>(count_row_tiles(job, kTile)));
  launch_kernel(gpu, "dense gemm", kernel, grid, dim3(kThreads), 2 * kStageBytes, job);
}

}  // namespace

void launch_dense_gemm(const DenseJob& job, const Gpu& gpu) {
  TQ_CHECK(count_row_tiles(job, kTile) < 65536);
  visit_storage(job.segments[0].w.storage,
                [&](auto storage) { launch_storage<storage>(job, gpu); });
}

}  // namespace tq::cuda
