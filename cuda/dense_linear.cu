// dense_linear - products with weights that meet f32 inputs: unquantized models, 16-bit factors,
// the head, packed matrices whose input is not rounded.
//
// dense - y_s (+)= x W_s^T in f32 for linears s that read the same x
// Shapes    W_s [out_s, in] in the file's layout, any storage; x [m, in], y_s [m, out_s] f32
// Work      few rows (matvec): a warp one to four rows of W, lanes along the columns. More:
//           dense_wgmma.cu or dense_gemm.cu
// Memory    W once -> DRAM
// Constants 8 or 16 columns a lane: 16 bytes of 16- or 8-bit weights
// Requires  nothing; tails are guarded
// Error     one f32 sum of `in` products in another order than the CPU's: gamma_(in + 2) |x||w|,
//           where gamma_n = n 2^-24 / (1 - n 2^-24); tests/test_cuda_linears.cpp
#include "cuda/dense_columns.cuh"
#include "cuda/device.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

// Most rows of a matvec; more are faster on tensor cores (on an H100 8 rows are, 4 mostly not).
constexpr int kMatvecTokens = 8, kMatvecTokensOfHopper = 4;

// Columns of a lane in the matvec: 16 bytes of 8-bit codes.
template <Storage kStorage>
constexpr int kLaneCols = kStorage == Storage::kQ4 || kStorage == Storage::kQ8 ? 16 : 8;

constexpr int kWarps = 8;  // of a block

// kRows: of W a warp. More of them are more loads under way, and x is read once for all.
template <Storage kStorage, int kTokens, int kRows, bool kAligned>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    dense_matvec_kernel(const __grid_constant__ DenseJob job) {
  int64_t tile = blockIdx.x;
  const DenseSegment& segment = segment_of(job, tile, kWarps * kRows);
  const CanonicalView& w = segment.w;
  const int64_t row = (tile * kWarps + threadIdx.x / kWarp) * kRows;
  const int lane = threadIdx.x % kWarp;
  float sums[kRows][kTokens] = {};
  constexpr int kCols = kLaneCols<kStorage>;
  const int cols = static_cast<int>(w.cols);
  using Batch = Columns<kStorage, kCols, kAligned>[kRows];
  const auto load = [&](Batch& columns, int col) {
    if (row >= w.rows || col >= cols) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) columns[i].load(w, min(row + i, w.rows - 1), col);
  };
  // Asked for before the kernel ahead has ended, and then one step before they are needed.
  Batch next;
  load(next, lane * kCols);
  begin_kernel();
  if (row >= w.rows) return;
#pragma unroll 2
  for (int col = lane * kCols; col < cols; col += kWarp * kCols) {
    Batch columns;
#pragma unroll
    for (int i = 0; i < kRows; ++i) columns[i] = next[i];
    load(next, col + kWarp * kCols);
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      if (token >= job.rows) break;
      const float* x = job.x + token * w.cols + col;
      float values[kCols];
      if constexpr (kAligned) {
#pragma unroll
        for (int i = 0; i < kCols / 4; ++i) {
          reinterpret_cast<float4*>(values)[i] = reinterpret_cast<const float4*>(x)[i];
        }
      } else {
#pragma unroll
        for (int i = 0; i < kCols; ++i) values[i] = col + i < cols ? x[i] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float dot = 0;
#pragma unroll
        for (int j = 0; j < kCols; ++j) dot = fmaf(values[j], columns[i].at(j), dot);
        sums[i][token] = fmaf(dot, columns[i].scale, sums[i][token]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (row + i >= w.rows) break;
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      if (token >= job.rows) break;
      const float sum = warp_sum(sums[i][token]);
      float& y = segment.y[token * w.rows + row + i];
      if (lane == 0) y = job.accumulate ? y + sum : sum;
    }
  }
}

template <Storage kStorage, int kTokens, int kRows, bool kAligned>
void launch_matvec(const DenseJob& job, const Gpu& gpu) {
  const auto n_blocks = static_cast<unsigned>(count_row_tiles(job, kWarps * kRows));
  launch_kernel(gpu, "dense matvec", dense_matvec_kernel<kStorage, kTokens, kRows, kAligned>,
                dim3(n_blocks), dim3(kWarps * kWarp), 0, job);
}

template <Storage kStorage, bool kAligned>
void launch_few(const DenseJob& job, const Gpu& gpu) {
  if (job.rows > 1) return launch_matvec<kStorage, kMatvecTokens, 2, kAligned>(job, gpu);
  // As many rows a warp as leave work for every multiprocessor.
  const int64_t rows_of_warp = count_row_tiles(job, 1) / (int64_t{kWarps} * gpu.facts.n_sms);
  if (rows_of_warp >= 8) return launch_matvec<kStorage, 1, 4, kAligned>(job, gpu);
  rows_of_warp >= 2 ? launch_matvec<kStorage, 1, 2, kAligned>(job, gpu)
                    : launch_matvec<kStorage, 1, 1, kAligned>(job, gpu);
}

// One thread an output: integers inside a group, one fma a group in ascending order, as
// cpu/packed_matmul.h defines it. Bit for bit the CPU's result.
__global__ void packed_simple_kernel(const __grid_constant__ PackedSimpleJob job) {
  begin_kernel();
  const CanonicalView& w = job.w;
  const int64_t row = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, token = blockIdx.y;
  if (row >= w.rows) return;
  const uint8_t* data = w.data + row * w.row_bytes;
  const int64_t w_group = w.group >= w.cols ? w.cols : w.group;
  const int64_t x_group = job.x.group >= w.cols ? w.cols : job.x.group;
  const int64_t inner = min(w_group, x_group);
  float sum = 0;
  for (int64_t begin = 0; begin < w.cols; begin += inner) {
    const int64_t end = min(begin + inner, w.cols);
    int dot = 0;
    for (int64_t col = begin; col < end; ++col) {
      const int code = w.storage == Storage::kQ8
                           ? static_cast<int8_t>(data[col])
                           : (col % 2 ? data[col / 2] >> 4 : data[col / 2] & 15) - 8;
      dot += code * code_at(job.x, token, col);
    }
    const float scale = job.x.scales[scale_offset(job.x, token, begin / x_group)] *
                        __half2float(w.scales[row * w.n_groups + begin / w_group]);
    sum = fmaf(static_cast<float>(dot), scale, sum);
  }
  float& y = job.y[token * w.rows + row];
  y = job.accumulate ? y + sum : sum;
}

}  // namespace

void launch_dense(const DenseJob& job, const Gpu& gpu) {
  TQ_CHECK(job.n_segments > 0 && job.n_segments <= kMaxLinears);
  const CanonicalView& first = job.segments[0].w;
  for (int i = 0; i < job.n_segments; ++i) {
    const CanonicalView& w = job.segments[i].w;
    TQ_CHECK(w.data && w.storage == first.storage && w.cols == first.cols &&
             w.cols < int64_t{1} << 22);
  }
  if (job.rows == 0) return;
  const bool hopper = gpu.facts.major == 9;
  if (job.rows > (hopper ? kMatvecTokensOfHopper : kMatvecTokens)) {
    return hopper ? launch_dense_wgmma(job, gpu) : launch_dense_gemm(job, gpu);
  }
  visit_storage(first.storage, [&](auto storage) {
    rows_aligned(job, kLaneCols<storage>) ? launch_few<storage, true>(job, gpu)
                                          : launch_few<storage, false>(job, gpu);
  });
}

void launch_packed_simple(const PackedSimpleJob& job, const Gpu& gpu) {
  TQ_CHECK(job.w.data && job.rows < 65536);
  if (job.rows == 0) return;
  const dim3 grid(static_cast<unsigned>((job.w.rows + 127) / 128), static_cast<unsigned>(job.rows));
  launch_kernel(gpu, "packed simple", packed_simple_kernel, grid, dim3(128), 0, job);
}

}  // namespace tq::cuda
