// rows - everything that happens to a row of activations before a matrix product, in one pass.
//
// rows - x' = round(H(rms_norm(silu(x + term) * up)))   each part optional (kernels.h, RowsJob)
// Shapes    x, term, up [rows, cols] f32; codes [rows, padded_cols] s8, scales [group, row] f32
// Work      a block of threads a row; the row stays in shared memory between the parts; a warp
//           rounds a group
// Memory    each input read once, each wanted result written once -> DRAM in prefill; decode is
//           one row, so one block: latency
// Constants 32 floats + 1 of padding in shared memory: the butterflies of neighbouring elements
//           meet no bank twice
// Requires  a row fits shared memory: cols <= 24,000 on any device, 56,000 on sm_90 and sm_80 / 2
// Error     sums of squares in double (below half an ulp of f32); all else takes the CPU's
//           operations in the CPU's order: bit for bit but for exp (2 ulp). tests/test_cuda_ops.cpp
// Source    docs/format.md, "Rounding of activations"; radix-8 butterflies as in any FFT
#include <algorithm>

#include "cuda/device.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

__host__ __device__ constexpr int64_t padded_index(int64_t i) {
  return i + (i >> 5);
}

__device__ inline float silu(float x) {
  return x / (1.0f + expf(-x));
}

// Sum over the block of threads; every thread gets it.
__device__ double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  const int n_warps = blockDim.x / kWarp;
  double sum = 0;
  for (int i = 0; i < n_warps; ++i) sum += scratch[i];
  return sum;
}

// kRadix = 2^n: n butterfly stages, strides half, 2 half, ..., on every part of `inner` elements.
template <int kRadix>
__device__ void butterfly_pass(float* v, int64_t count, int64_t half) {
  for (int64_t item = threadIdx.x; item < count / kRadix; item += blockDim.x) {
    const int64_t first = item / half * (half * kRadix) + item % half;
    float part[kRadix];
#pragma unroll
    for (int i = 0; i < kRadix; ++i) part[i] = v[padded_index(first + i * half)];
#pragma unroll
    for (int stage = 1; stage < kRadix; stage *= 2) {
#pragma unroll
      for (int i = 0; i < kRadix; ++i) {
        if (i & stage) continue;
        const float a = part[i], b = part[i + stage];
        part[i] = a + b;
        part[i + stage] = a - b;
      }
    }
#pragma unroll
    for (int i = 0; i < kRadix; ++i) v[padded_index(first + i * half)] = part[i];
  }
  __syncthreads();
}

// The row in shared memory -> transformed row in `to` (device memory).
__device__ void hadamard(const RowsJob& job, float* v, float* to) {
  if (job.signs && !job.inverse) {
    for (int64_t i = threadIdx.x; i < job.cols; i += blockDim.x) {
      if (job.signs[i] < 0) v[padded_index(i)] = -v[padded_index(i)];
    }
    __syncthreads();
  }
  const int64_t m = job.base_order, inner = job.block / m;
  // Stages never leave a part of `inner` = 2^k elements, and those tile the row.
  int64_t half = 1;
  for (; half * 8 <= inner; half *= 8) butterfly_pass<8>(v, job.cols, half);
  if (half * 4 <= inner) {
    butterfly_pass<4>(v, job.cols, half);
  } else if (half * 2 <= inner) {
    butterfly_pass<2>(v, job.cols, half);
  }
  for (int64_t i = threadIdx.x; i < job.cols; i += blockDim.x) {
    const int64_t first = i / job.block * job.block, at = i - first;
    const int64_t lane = at % inner, row = at / inner;
    float sum = v[padded_index(first + lane)];
    if (m > 1) {
      const int64_t step = job.inverse ? 1 : m;
      const int8_t* signs = job.base + (job.inverse ? row * m : row);
      sum = signs[0] < 0 ? -sum : sum;
      for (int64_t from = 1; from < m; ++from) {
        const float term = v[padded_index(first + from * inner + lane)];
        sum += signs[from * step] < 0 ? -term : term;
      }
    } else {
      sum = v[padded_index(i)];
    }
    sum *= job.hadamard_scale;
    to[i] = job.signs && job.inverse && job.signs[i] < 0 ? -sum : sum;
  }
  __syncthreads();
}

// One group of one row by a warp. `at(i)` is the value of column i.
template <typename At>
__device__ void round_group(const RowsJob& job, int64_t row, int64_t group, const At& at) {
  const RoundedRows& to = job.rounded;
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = group * to.group;
  const int64_t end = min(begin + to.group, job.cols);
  // The bit pattern of |x| orders like |x|, NaN above infinity.
  uint32_t largest = 0;
  for (int64_t i = begin + lane; i < end; i += kWarp) {
    largest = max(largest, __float_as_uint(at(i)) & 0x7FFFFFFFu);
  }
  largest = __reduce_max_sync(kFullMask, largest);
  const float half = static_cast<float>(1 << (job.bits - 1));
  float scale, inverse, low, high = half - 1;
  if (job.full_range) {
    // The first element of that magnitude.
    int64_t first = end;
    for (int64_t i = begin + lane; i < end && first == end; i += kWarp) {
      if ((__float_as_uint(at(i)) & 0x7FFFFFFFu) == largest) first = i;
    }
    first = __reduce_min_sync(kFullMask, static_cast<unsigned>(first));
    const float a = at(first) * job.clip;
    scale = -a / half;
    inverse = a < 0 || a > 0 ? half / -a : 0.0f;
    low = -half;
  } else {
    const float amax = __uint_as_float(largest) * job.clip;
    scale = amax / (half - 1);
    inverse = amax > 0 ? (half - 1) / amax : 0.0f;
    low = 1 - half;
  }
  if (lane == 0) to.scales[group * to.stride + row] = scale;
  int8_t* codes = to.codes + row * to.padded_cols;
  for (int64_t i = begin + lane; i < end; i += kWarp) {
    const float scaled = at(i) * inverse;
    const float above = scaled > low ? scaled : low;  // also the answer for NaN
    const float bounded = above < high ? above : high;
    const float code = (bounded + kRoundMagic) - kRoundMagic;
    codes[code_position(i)] = static_cast<int8_t>(static_cast<int>(code));
    if (job.expanded) job.expanded[row * job.cols + i] = scale * code;
  }
}

__global__ void rows_kernel(const __grid_constant__ RowsJob job) {
  begin_kernel();
  extern __shared__ float v[];
  __shared__ double sums[kWarp];
  const int64_t row = blockIdx.x, first = row * job.cols;
  double squares = 0;
  for (int64_t i = threadIdx.x; i < job.cols; i += blockDim.x) {
    float x = job.x[first + i];
    if (job.term) x += job.term[first + i];
    if (job.up) x = silu(x) * job.up[first + i];
    if (job.sum) job.sum[first + i] = x;
    squares += static_cast<double>(x) * static_cast<double>(x);
    v[padded_index(i)] = x;
  }
  if (job.gain) {
    const double mean = block_sum(squares, sums) / static_cast<double>(job.cols);
    const float factor = static_cast<float>(1.0 / sqrt(mean + static_cast<double>(job.eps)));
    for (int64_t i = threadIdx.x; i < job.cols; i += blockDim.x) {
      const float x = v[padded_index(i)] * factor * job.gain[i];
      if (job.normed) job.normed[first + i] = x;
      v[padded_index(i)] = x;
    }
  }
  __syncthreads();
  if (job.block > 0) hadamard(job, v, job.transformed + first);
  if (job.bits >= 16) return;
  const int64_t n_groups = (job.cols + job.rounded.group - 1) / job.rounded.group;
  for (int64_t group = threadIdx.x / kWarp; group < n_groups; group += blockDim.x / kWarp) {
    if (job.block > 0) {
      round_group(job, row, group, [&](int64_t i) { return job.transformed[first + i]; });
    } else {
      round_group(job, row, group, [&](int64_t i) { return v[padded_index(i)]; });
    }
  }
  for (int64_t i = job.cols + threadIdx.x; i < job.rounded.padded_cols; i += blockDim.x) {
    job.rounded.codes[row * job.rounded.padded_cols + code_position(i)] = 0;
  }
}

__global__ void repack_kernel(CanonicalView from, int64_t n_panels, int64_t padded_cols,
                              uint4* codes, __half2* scales) {
  const int64_t n_blocks = padded_cols / 64;
  const int64_t item = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (item < n_panels * n_blocks * kWarp) {
    const int lane = static_cast<int>(item % kWarp);
    const int64_t block = item / kWarp % n_blocks, panel = item / kWarp / n_blocks;
    uint32_t words[4];
    for (int w = 0; w < 4; ++w) {
      const int64_t row = panel * kPanelRows + lane / 4 + (w % 2 ? 8 : 0);
      words[w] = 0;
      for (int i = 0; i < 8; ++i) {
        const int64_t col = block * 64 + w / 2 * 32 + lane % 4 * 8 + i;
        uint32_t code = 0;
        if (row < from.rows && col < from.cols) {
          const uint32_t byte = from.data[row * from.row_bytes + col / 2];
          code = (col % 2 ? byte >> 4 : byte & 15) ^ 8;  // code + 8 -> signed nibble
        }
        words[w] |= code << (i % 4 * 8 + i / 4 * 4);
      }
    }
    codes[item] = make_uint4(words[0], words[1], words[2], words[3]);
  }
  if (item < n_panels * from.n_groups * 8) {
    const int64_t pair = item % 8, group = item / 8 % from.n_groups;
    const int64_t row = item / 8 / from.n_groups * kPanelRows + pair;
    const auto at = [&](int64_t r) {
      return r < from.rows ? from.scales[r * from.n_groups + group] : __float2half(0.0f);
    };
    scales[item] = __halves2half2(at(row), at(row + 8));
  }
}

}  // namespace

void launch_rows(const RowsJob& job, const Gpu& gpu) {
  const int64_t shared = padded_index(job.cols) * 4 + 4;
  if (shared > gpu.facts.shared_bytes) {
    throw Error(ErrorKind::kResource, "row too long for this GPU", gpu.facts.name,
                std::to_string(job.cols) + " columns do not fit its shared memory");
  }
  TQ_CHECK(job.block == 0 || job.transformed, "a transformed row needs a place");
  if (job.rows == 0) return;
  // One row is latency: as many threads as there are elements. Many rows fill the device anyway.
  const int64_t wanted = (job.cols + kWarp - 1) / kWarp * kWarp;
  const int64_t threads =
      std::clamp<int64_t>(wanted / (job.rows > 64 ? 4 : 1), kWarp, job.rows > 64 ? 512 : 1024) /
      kWarp * kWarp;
  launch_kernel(gpu, "rows", rows_kernel, dim3(static_cast<unsigned>(job.rows)),
                dim3(static_cast<unsigned>(threads)), shared, job);
}

void launch_repack(const CanonicalView& from, int64_t n_panels, int64_t padded_cols, uint4* codes,
                   __half2* scales, const Gpu& gpu) {
  const int64_t items =
      std::max(n_panels * (padded_cols / 64) * kWarp, n_panels * from.n_groups * 8);
  repack_kernel<<<static_cast<unsigned>((items + 255) / 256), 256, 0, gpu.stream>>>(
      from, n_panels, padded_cols, codes, scales);
  cuda_check(cudaGetLastError(), "repack");
}

}  // namespace tq::cuda
