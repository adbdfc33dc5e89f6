// dense_linear - products with weights that meet f32 inputs: unquantized models, 16-bit factors,
// the head, packed matrices whose input is not rounded.
//
// dense - y (+)= x W^T in f32
// Shapes    W [out, in] in the file's layout, any storage; x [m, in], y [m, out] f32
// Work      matvec (m <= 8): a warp two to four rows of W, lanes along the columns in words of 16
// bytes.
//           gemm: a block 64 x 64 outputs, 16 columns at a time through shared memory, a thread
//           4 x 4 outputs
// Memory    matvec: W once -> DRAM. gemm: f32 units (67 TFLOP/s on an H200), not tensor cores: an
//           unquantized model is the reference that others are measured by
// Constants tile 64 x 64 x 16 with 4 x 4 a thread: 8 loads from shared memory for 16 fma
// Requires  nothing; tails are guarded
// Error     one f32 sum of `in` products in another order than the CPU's: gamma_in |x||w|, with
//           gamma_n = n 2^-24 / (1 - n 2^-24); tests/test_cuda_ops.cpp
#include <algorithm>

#include "cuda/device.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kMatvecTokens = 8;

// Eight columns from `col` on as f32; zeros behind the last one.
template <Storage kStorage>
__device__ inline void load_eight(const CanonicalView& w, int64_t row, int64_t col, bool aligned,
                                  float* out) {
  if (!aligned || col + 8 > w.cols) {
    for (int i = 0; i < 8; ++i) out[i] = col + i < w.cols ? canonical_at(w, row, col + i) : 0.0f;
    return;
  }
  const uint8_t* data = w.data + row * w.row_bytes;
  if constexpr (kStorage == Storage::kF32) {
    const float4 a = reinterpret_cast<const float4*>(data)[col / 4];
    const float4 b = reinterpret_cast<const float4*>(data)[col / 4 + 1];
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
    out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
  } else if constexpr (kStorage == Storage::kF16 || kStorage == Storage::kBF16) {
    const uint4 words = *reinterpret_cast<const uint4*>(data + col * 2);
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
    for (int i = 0; i < 4; ++i) {
      if constexpr (kStorage == Storage::kBF16) {
        out[2 * i] = __uint_as_float(pairs[i] << 16);
        out[2 * i + 1] = __uint_as_float(pairs[i] & 0xFFFF0000u);
      } else {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(pairs[i]));
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
      }
    }
  } else {
    // Groups are multiples of 8 here, so one scale serves all.
    const float scale = __half2float(w.scales[row * w.n_groups + col / w.group]);
    if constexpr (kStorage == Storage::kQ4) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(data + col / 2);
      for (int i = 0; i < 8; ++i) {
        out[i] = scale * (small_float(word >> 4 * i & 15) - 8.0f);
      }
    } else {
      const uint2 words = *reinterpret_cast<const uint2*>(data + col);
      for (int i = 0; i < 8; ++i) {
        const uint32_t word = i < 4 ? words.x : words.y;
        out[i] = scale * (small_float((word ^ 0x80808080u) >> i % 4 * 8 & 255) - 128.0f);
      }
    }
  }
}

// Whether load_eight() may read whole words: every row and group begins at a multiple of 8 columns.
bool rows_aligned(const CanonicalView& w) {
  const bool packed = w.storage == Storage::kQ4 || w.storage == Storage::kQ8;
  return w.cols % 8 == 0 && (!packed || w.group % 8 == 0 || w.group >= w.cols);
}

// Rows of W a warp: more loads under way, and x read once for all of them.
template <int kTokens>
constexpr int kRowsOfWarp = kTokens == 1 ? 4 : 2;

template <Storage kStorage, int kTokens>
__global__ void __launch_bounds__(256, 2)
    dense_matvec_kernel(const __grid_constant__ DenseJob job, bool aligned) {
  begin_kernel();
  constexpr int kRows = kRowsOfWarp<kTokens>;
  const CanonicalView& w = job.w;
  const int64_t row = (blockIdx.x * int64_t{blockDim.x / kWarp} + threadIdx.x / kWarp) * kRows;
  if (row >= w.rows) return;
  const int lane = threadIdx.x % kWarp;
  float sums[kRows][kTokens] = {};
#pragma unroll 2
  for (int64_t col = lane * 8; col < w.cols; col += kWarp * 8) {
    float a[kRows][8];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      load_eight<kStorage>(w, min(row + i, w.rows - 1), col, aligned, a[i]);
    }
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      if (token >= job.rows) break;
      const float* x = job.x + token * w.cols + col;
      float values[8];
      if (aligned) {
        *reinterpret_cast<float4*>(values) = *reinterpret_cast<const float4*>(x);
        *reinterpret_cast<float4*>(values + 4) = *reinterpret_cast<const float4*>(x + 4);
      } else {
        for (int i = 0; i < 8; ++i) values[i] = col + i < w.cols ? x[i] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i][token] = fmaf(values[j], a[i][j], sums[i][token]);
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
      float& y = job.y[token * w.rows + row + i];
      if (lane == 0) y = job.accumulate ? y + sum : sum;
    }
  }
}

constexpr int kTile = 64, kDepth = 16, kThreads = 256;

template <Storage kStorage>
__global__ void dense_gemm_kernel(const __grid_constant__ DenseJob job, bool aligned) {
  begin_kernel();
  const CanonicalView& w = job.w;
  // [column][row or token]; 4 more columns keep the transposing stores apart.
  __shared__ float w_tile[kDepth][kTile + 4], x_tile[kDepth][kTile + 4];
  const int64_t first_row = blockIdx.x * int64_t{kTile}, first_token = blockIdx.y * int64_t{kTile};
  const int thread = threadIdx.x, tx = thread % 16, ty = thread / 16;
  float sums[4][4] = {};
  for (int64_t col = 0; col < w.cols; col += kDepth) {
    if (thread < 128) {  // 64 rows x 2 stretches of 8 columns
      const int64_t row = first_row + thread / 2, at = col + thread % 2 * 8;
      float part[8] = {};
      if (row < w.rows && at < w.cols) load_eight<kStorage>(w, row, at, aligned, part);
      for (int i = 0; i < 8; ++i) w_tile[thread % 2 * 8 + i][thread / 2] = part[i];
    } else {
      const int64_t token = first_token + (thread - 128) / 2, at = col + thread % 2 * 8;
      for (int i = 0; i < 8; ++i) {
        x_tile[thread % 2 * 8 + i][(thread - 128) / 2] =
            token < job.rows && at + i < w.cols ? job.x[token * w.cols + at + i] : 0.0f;
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const float4 a = *reinterpret_cast<const float4*>(&w_tile[k][tx * 4]);
      const float4 b = *reinterpret_cast<const float4*>(&x_tile[k][ty * 4]);
      const float rows[4] = {a.x, a.y, a.z, a.w}, tokens[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(tokens[i], rows[j], sums[i][j]);
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    const int64_t token = first_token + ty * 4 + i;
    for (int j = 0; j < 4; ++j) {
      const int64_t row = first_row + tx * 4 + j;
      if (token >= job.rows || row >= w.rows) continue;
      float& y = job.y[token * w.rows + row];
      y = job.accumulate ? y + sums[i][j] : sums[i][j];
    }
  }
}

template <Storage kStorage>
void launch_storage(const DenseJob& job, const Gpu& gpu) {
  const bool aligned = rows_aligned(job.w);
  if (job.rows <= kMatvecTokens) {
    const int64_t rows = 8 * (job.rows == 1 ? kRowsOfWarp<1> : kRowsOfWarp<2>);  // of a block
    const dim3 grid(static_cast<unsigned>((job.w.rows + rows - 1) / rows));
    const auto kernel = job.rows == 1 ? dense_matvec_kernel<kStorage, 1>
                                      : dense_matvec_kernel<kStorage, kMatvecTokens>;
    launch_kernel(gpu, "dense matvec", kernel, grid, dim3(256), 0, job, aligned);
    return;
  }
  const dim3 grid(static_cast<unsigned>((job.w.rows + kTile - 1) / kTile),
                  static_cast<unsigned>((job.rows + kTile - 1) / kTile));
  launch_kernel(gpu, "dense gemm", dense_gemm_kernel<kStorage>, grid, dim3(kThreads), 0, job,
                aligned);
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
  TQ_CHECK(job.w.data && job.rows < 64 * 65535);
  if (job.rows == 0) return;
  switch (job.w.storage) {
    case Storage::kF32:
      return launch_storage<Storage::kF32>(job, gpu);
    case Storage::kF16:
      return launch_storage<Storage::kF16>(job, gpu);
    case Storage::kBF16:
      return launch_storage<Storage::kBF16>(job, gpu);
    case Storage::kQ4:
      return launch_storage<Storage::kQ4>(job, gpu);
    case Storage::kQ8:
      return launch_storage<Storage::kQ8>(job, gpu);
  }
}

void launch_packed_simple(const PackedSimpleJob& job, const Gpu& gpu) {
  TQ_CHECK(job.w.data && job.rows < 65536);
  if (job.rows == 0) return;
  const dim3 grid(static_cast<unsigned>((job.w.rows + 127) / 128), static_cast<unsigned>(job.rows));
  launch_kernel(gpu, "packed simple", packed_simple_kernel, grid, dim3(128), 0, job);
}

}  // namespace tq::cuda
