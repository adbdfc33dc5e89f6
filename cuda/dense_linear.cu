// dense_linear - products with weights that meet f32 inputs: unquantized models, 16-bit factors,
// the head, packed matrices whose input is not rounded.
//
// dense - y (+)= x W^T in f32
// Shapes    W [out, in] in the file's layout, any storage; x [m, in], y [m, out] f32
// Work      matvec (m <= 8): a warp two to four rows of W, lanes along the columns
//           gemm: a block 64 x 64 outputs, 16 columns at a time through shared memory, a thread
//           4 x 4 outputs
// Memory    matvec: W once -> DRAM. gemm: f32 units (67 TFLOP/s on an H200), not tensor cores: an
//           unquantized model is the reference that others are measured by
// Constants tile 64 x 64 x 16 with 4 x 4 a thread: 8 loads from shared memory for 16 fma
// Requires  nothing; tails are guarded
// Error     one f32 sum of `in` products in another order than the CPU's: gamma_(in + 2) |x||w|,
//           where gamma_n = n 2^-24 / (1 - n 2^-24); tests/test_cuda_linears.cpp
#include <algorithm>

#include "cuda/device.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kMatvecTokens = 8;

// The number in byte i of a word of unsigned ones, minus 128.
__device__ inline float byte_float(uint32_t word, int i) {
  return __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440 | i)) - 8388736.0f;
}

// kCount columns from `col` on: their f32 values are what is returned times out[]; zeros behind the
// last one. kAligned: rows_aligned(); without a branch, loads of several rows are under way at
// once.
template <Storage kStorage, int kCount, bool kAligned>
__device__ inline float load_columns(const CanonicalView& w, int64_t row, int col, float* out) {
  if constexpr (!kAligned) {
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) {
      const float value = col + i < w.cols ? canonical_at(w, row, col + i) : 0.0f;
#pragma unroll
      for (int j = 0; j < kCount; ++j) out[j] = i == j ? value : out[j];  // stays in registers
    }
    return 1.0f;
  }
  constexpr int kBits = kStorage == Storage::kF32  ? 32
                        : kStorage == Storage::kQ4 ? 4
                        : kStorage == Storage::kQ8 ? 8
                                                   : 16;
  constexpr int kWords = kCount * kBits / 32;
  uint32_t words[kWords];
  const uint8_t* data = w.data + row * w.row_bytes + int64_t{col} * kBits / 8;
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      reinterpret_cast<uint4*>(words)[i] = reinterpret_cast<const uint4*>(data)[i];
    }
  } else if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(words) = *reinterpret_cast<const uint2*>(data);
  } else {
    words[0] = *reinterpret_cast<const uint32_t*>(data);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (kStorage == Storage::kF32) {
      out[i] = __uint_as_float(words[i]);
    } else if constexpr (kStorage == Storage::kBF16) {
      out[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
    } else if constexpr (kStorage == Storage::kF16) {
      const __half2 pair = reinterpret_cast<const __half2&>(words[i / 2]);
      out[i] = i % 2 ? __high2float(pair) : __low2float(pair);
    } else if constexpr (kStorage == Storage::kQ4) {
      out[i] = small_float(words[i / 8] >> i % 8 * 4 & 15) - 8.0f;
    } else {
      out[i] = byte_float(words[i / 4] ^ 0x80808080u, i % 4);
    }
  }
  if constexpr (kStorage == Storage::kQ4 || kStorage == Storage::kQ8) {
    // Groups are multiples of kCount here, so one scale serves all. 32 bits: a division of 64 took
    // longer than the columns.
    const uint32_t group =
        w.group >= w.cols ? 0 : static_cast<uint32_t>(col) / static_cast<uint32_t>(w.group);
    return __half2float(w.scales[row * w.n_groups + group]);
  }
  return 1.0f;
}

// Whether load_columns() may read whole words: every row and group begins, and rows end, at a
// multiple of `count` columns.
bool rows_aligned(const CanonicalView& w, int count) {
  const bool packed = w.storage == Storage::kQ4 || w.storage == Storage::kQ8;
  return w.cols % count == 0 && (!packed || w.group % count == 0 || w.group >= w.cols);
}

// Columns of a lane in the matvec: 16 bytes of 8-bit codes.
template <Storage kStorage>
constexpr int kLaneCols = kStorage == Storage::kQ4 || kStorage == Storage::kQ8 ? 16 : 8;

// Rows of W a warp: more loads under way, and x read once for all of them.
template <int kTokens>
constexpr int kRowsOfWarp = kTokens == 1 ? 4 : 2;

template <Storage kStorage, int kTokens, bool kAligned>
__global__ void __launch_bounds__(256, 2)
    dense_matvec_kernel(const __grid_constant__ DenseJob job) {
  begin_kernel();
  constexpr int kRows = kRowsOfWarp<kTokens>;
  const CanonicalView& w = job.w;
  const int64_t row = (blockIdx.x * int64_t{blockDim.x / kWarp} + threadIdx.x / kWarp) * kRows;
  if (row >= w.rows) return;
  const int lane = threadIdx.x % kWarp;
  float sums[kRows][kTokens] = {};
  constexpr int kCols = kLaneCols<kStorage>;
  const int cols = static_cast<int>(w.cols);
#pragma unroll 2
  for (int col = lane * kCols; col < cols; col += kWarp * kCols) {
    float a[kRows][kCols], scales[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t from = min(row + i, w.rows - 1);
      scales[i] = load_columns<kStorage, kCols, kAligned>(w, from, col, a[i]);
    }
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
        for (int j = 0; j < kCols; ++j) dot = fmaf(values[j], a[i][j], dot);
        sums[i][token] = fmaf(dot, scales[i], sums[i][token]);
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

template <Storage kStorage, bool kAligned>
__global__ void dense_gemm_kernel(const __grid_constant__ DenseJob job) {
  begin_kernel();
  const CanonicalView& w = job.w;
  // [column][row or token]; 4 more columns keep the transposing stores apart.
  __shared__ float w_tile[kDepth][kTile + 4], x_tile[kDepth][kTile + 4];
  const int64_t first_row = blockIdx.x * int64_t{kTile}, first_token = blockIdx.y * int64_t{kTile};
  const int thread = threadIdx.x, tx = thread % 16, ty = thread / 16;
  float sums[4][4] = {};
  for (int col = 0; col < w.cols; col += kDepth) {
    if (thread < 128) {  // 64 rows x 2 stretches of 8 columns
      const int64_t row = first_row + thread / 2;
      const int at = col + thread % 2 * 8;
      float part[8] = {}, scale = 0;
      if (row < w.rows && at < w.cols) {
        scale = load_columns<kStorage, 8, kAligned>(w, row, at, part);
      }
      for (int i = 0; i < 8; ++i) w_tile[thread % 2 * 8 + i][thread / 2] = scale * part[i];
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

template <Storage kStorage, bool kAligned>
void launch_matvec(const DenseJob& job, const Gpu& gpu) {
  const int64_t rows = 8 * (job.rows == 1 ? kRowsOfWarp<1> : kRowsOfWarp<2>);  // of a block
  const auto kernel = job.rows == 1 ? dense_matvec_kernel<kStorage, 1, kAligned>
                                    : dense_matvec_kernel<kStorage, kMatvecTokens, kAligned>;
  launch_kernel(gpu, "dense matvec", kernel,
                dim3(static_cast<unsigned>((job.w.rows + rows - 1) / rows)), dim3(256), 0, job);
}

template <Storage kStorage>
void launch_storage(const DenseJob& job, const Gpu& gpu) {
  if (job.rows <= kMatvecTokens) {
    return rows_aligned(job.w, kLaneCols<kStorage>) ? launch_matvec<kStorage, true>(job, gpu)
                                                    : launch_matvec<kStorage, false>(job, gpu);
  }
  const auto kernel = rows_aligned(job.w, 8) ? dense_gemm_kernel<kStorage, true>
                                             : dense_gemm_kernel<kStorage, false>;
  const dim3 grid(static_cast<unsigned>((job.w.rows + kTile - 1) / kTile),
                  static_cast<unsigned>((job.rows + kTile - 1) / kTile));
  launch_kernel(gpu, "dense gemm", kernel, grid, dim3(kThreads), 0, job);
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
  TQ_CHECK(job.w.data && job.rows < 64 * 65535 && job.w.cols < int64_t{1} << 30);
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
