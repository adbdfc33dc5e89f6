// rows - everything that happens to a row of activations before a matrix product, in one pass.
//
// rows - x' = round(H(rms_norm(silu(x + term) * up)))   each part optional (kernels.h, RowsJob)
// Shapes    x, term, up [rows, cols] f32; codes [rows, padded_cols] s8, scales [group, row] f32
// Work      a block of threads a row, or 512 columns of one of few; it stays in shared memory
// between
//           the parts; a warp rounds a group, or 128 columns
// Memory    each input read once, each wanted result written once -> DRAM in prefill; decode is
//           one row, so one block: latency
// Constants 32 floats + 1 of padding in shared memory: the butterflies of neighbouring elements
//           meet no bank twice
// Requires  a row fits shared memory: cols <= 24,000 on any device, 56,000 on sm_90 and sm_80 / 2
// Error     sums of squares in double (below half an ulp of f32); all else takes the CPU's
//           operations in the CPU's order: bit for bit but for exp (2 ulp). tests/test_cuda_ops.cpp
// Source    docs/format.md, "Rounding of activations"; radix-8 butterflies as in any FFT
#include <algorithm>
#include <type_traits>

#include "cuda/device.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int64_t kChunk = 512;  // columns of a block where several share a row: whole groups

__host__ __device__ constexpr int64_t padded_index(int64_t i) {
  return i + (i >> 5);
}

__device__ inline float silu(float x) {
  return x / (1.0f + expf(-x));
}

// Sum over the block of threads; every thread gets it.
__device__ double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_sum(lane < blockDim.x / kWarp ? scratch[lane] : 0.0);
}

// The numbers of one rounded group (model/weights.h, ActQuant).
struct GroupScale {
  float scale, inverse, low, high;
  // largest: the greatest |x|; first: the first x of that magnitude, for the full range.
  __device__ GroupScale(const RowsJob& job, float largest, float first) {
    const float half = static_cast<float>(1 << (job.bits - 1));
    high = half - 1;
    if (job.full_range) {
      const float a = first * job.clip;
      scale = -a / half;
      inverse = a < 0 || a > 0 ? half / -a : 0.0f;
      low = -half;
    } else {
      const float amax = largest * job.clip;
      scale = amax / (half - 1);
      inverse = amax > 0 ? (half - 1) / amax : 0.0f;
      low = 1 - half;
    }
  }
  __device__ float code(float x) const {
    const float scaled = x * inverse;
    const float above = scaled > low ? scaled : low;  // also the answer for NaN
    const float bounded = above < high ? above : high;
    return (bounded + kRoundMagic) - kRoundMagic;
  }
};

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

// One group of any size by a warp. `at(i)` is the value of column i.
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
  unsigned first = 0xFFFFFFFFu;
  for (int64_t i = begin + lane; i < end; i += kWarp) {
    if ((__float_as_uint(at(i)) & 0x7FFFFFFFu) != largest) continue;
    first = static_cast<unsigned>(i);
    break;
  }
  first = __reduce_min_sync(kFullMask, first);
  const GroupScale by(job, __uint_as_float(largest), at(first));
  if (lane == 0) to.scales[group * to.stride + row] = by.scale;
  int8_t* codes = to.codes + row * to.padded_cols;
  for (int64_t i = begin + lane; i < end; i += kWarp) {
    const float code = by.code(at(i));
    codes[code_position(i)] = static_cast<int8_t>(static_cast<int>(code));
    if (job.expanded) job.expanded[row * job.cols + i] = by.scale * code;
  }
}

// Groups of 32, 64 or 128 columns, whole ones: four columns a lane, 128 columns a warp.
template <typename At>
__device__ void round_stretch(const RowsJob& job, int64_t row, int64_t stretch, const At& at) {
  const RoundedRows& to = job.rounded;
  const int lane = threadIdx.x % kWarp;
  const int lanes = to.group / 4;  // of a group
  const int64_t col = stretch * 128 + lane * 4;
  const bool inside = col < job.cols;
  float x[4];
  uint32_t magnitudes[4], largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = inside ? at(col + i) : 0.0f;
    magnitudes[i] = __float_as_uint(x[i]) & 0x7FFFFFFFu;
    largest = max(largest, magnitudes[i]);
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    largest = max(largest, __shfl_xor_sync(kFullMask, largest, step));
  }
  // Of the columns of that magnitude the first; its sign rides in the lowest bit.
  unsigned first = 0xFFFFFFFFu;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    if (magnitudes[i] == largest) first = (lane * 4 + i) * 2 + (__float_as_uint(x[i]) >> 31);
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    first = min(first, __shfl_xor_sync(kFullMask, first, step));
  }
  const GroupScale by(job, __uint_as_float(largest), __uint_as_float(largest | first << 31));
  if (!inside) return;
  if (lane % lanes == 0) to.scales[col / to.group * to.stride + row] = by.scale;
  char4 codes;
  float* expanded = job.expanded ? job.expanded + row * job.cols + col : nullptr;
  signed char* parts = reinterpret_cast<signed char*>(&codes);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float code = by.code(x[i]);
    parts[i] = static_cast<signed char>(static_cast<int>(code));
    if (expanded) expanded[i] = by.scale * code;
  }
  *reinterpret_cast<char4*>(to.codes + row * to.padded_cols + code_position(col)) = codes;
}

// Columns [begin, end) of a row.
template <typename At>
__device__ void round_row(const RowsJob& job, int64_t row, int64_t begin, int64_t end,
                          const At& at) {
  const int group = job.rounded.group;
  const int64_t warp = threadIdx.x / kWarp, n_warps = blockDim.x / kWarp;
  if ((group == 32 || group == 64 || group == 128) && job.cols % 4 == 0) {
    for (int64_t i = begin / 128 + warp; i * 128 < end; i += n_warps) {
      round_stretch(job, row, i, at);
    }
  } else {  // one block a row
    const int64_t n_groups = (job.cols + group - 1) / group;
    for (int64_t i = warp; i < n_groups; i += n_warps) round_group(job, row, i, at);
  }
  if (end < job.cols) return;
  for (int64_t i = job.cols + threadIdx.x; i < job.rounded.padded_cols; i += blockDim.x) {
    job.rounded.codes[row * job.rounded.padded_cols + code_position(i)] = 0;
  }
}

// Elements [at, at + kCount) on their way into shared memory, element i there; the sum of their
// squares. Not `own`: another block's, wanted for the squares only.
template <int kCount>
__device__ double load_elements(const RowsJob& job, int64_t at, int64_t i, bool own, float* v) {
  using Vector = std::conditional_t<kCount == 4, float4, float>;
  const auto get = [&](const float* from) { return *reinterpret_cast<const Vector*>(from + at); };
  Vector vector = get(job.x);
  float* x = reinterpret_cast<float*>(&vector);
  if (job.term) {
    const Vector terms = get(job.term);
    for (int j = 0; j < kCount; ++j) x[j] += reinterpret_cast<const float*>(&terms)[j];
  }
  if (job.up) {
    const Vector factors = get(job.up);
    for (int j = 0; j < kCount; ++j)
      x[j] = silu(x[j]) * reinterpret_cast<const float*>(&factors)[j];
  }
  if (job.sum && own) *reinterpret_cast<Vector*>(job.sum + at) = vector;
  double squares = 0;
  for (int j = 0; j < kCount; ++j) {
    squares += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    if (own) v[padded_index(i + j)] = x[j];
  }
  return squares;
}

__global__ void rows_kernel(const __grid_constant__ RowsJob job, int64_t chunk) {
  begin_kernel();
  extern __shared__ float v[];  // columns [begin, end)
  __shared__ double sums[kWarp];
  const int64_t row = blockIdx.x, first = row * job.cols;
  const int64_t begin = blockIdx.y * chunk, end = min(begin + chunk, job.cols);
  const auto own = [&](int64_t i) { return i >= begin && i < end; };
  // The norm needs the squares of all columns, also where several blocks share a row.
  const int64_t load_begin = job.gain ? 0 : begin, load_end = job.gain ? job.cols : end;
  double squares = 0;
  if (job.cols % 4 == 0) {
#pragma unroll 4
    for (int64_t i = load_begin + threadIdx.x * 4; i < load_end; i += blockDim.x * 4) {
      squares += load_elements<4>(job, first + i, i - begin, own(i), v);
    }
  } else {
    for (int64_t i = load_begin + threadIdx.x; i < load_end; i += blockDim.x) {
      squares += load_elements<1>(job, first + i, i - begin, own(i), v);
    }
  }
  if (job.gain) {
    const double mean = block_sum(squares, sums) / static_cast<double>(job.cols);
    const float factor = static_cast<float>(1.0 / sqrt(mean + static_cast<double>(job.eps)));
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      const float x = v[padded_index(i - begin)] * factor * job.gain[i];
      if (job.normed) job.normed[first + i] = x;
      v[padded_index(i - begin)] = x;
    }
  }
  __syncthreads();
  if (job.block > 0) hadamard(job, v, job.transformed + first);
  if (job.bits >= 16) return;
  if (job.block > 0) {
    round_row(job, row, begin, end, [&](int64_t i) { return job.transformed[first + i]; });
  } else {
    round_row(job, row, begin, end, [&](int64_t i) { return v[padded_index(i - begin)]; });
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
  TQ_CHECK(job.block == 0 || job.transformed, "a transformed row needs a place");
  if (job.rows == 0) return;
  // Few rows are latency: several blocks share one, where no block needs what another one writes.
  const bool whole_groups = job.bits >= 16 || job.rounded.group <= 128;
  const bool in_place = job.gain && (job.term || job.up || job.normed == job.x);
  const bool divided = job.rows <= kMatvecRows && job.block == 0 && whole_groups && !in_place &&
                       job.cols % kChunk == 0;
  const int64_t chunk = divided ? kChunk : job.cols;
  const int64_t shared = padded_index(chunk) * 4 + 4;
  if (shared > gpu.facts.shared_bytes) {
    throw Error(ErrorKind::kResource, "row too long for this GPU", gpu.facts.name,
                std::to_string(job.cols) + " columns do not fit its shared memory");
  }
  // A thread for four elements that it loads. Many rows fill the device anyway.
  const int64_t loaded = job.gain ? job.cols : chunk;
  const int64_t threads =
      std::clamp<int64_t>((loaded + 127) / 128 * kWarp, kWarp, job.rows > 64 ? 256 : 1024);
  launch_kernel(
      gpu, "rows", rows_kernel,
      dim3(static_cast<unsigned>(job.rows), static_cast<unsigned>((job.cols + chunk - 1) / chunk)),
      dim3(static_cast<unsigned>(threads)), shared, job, chunk);
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
