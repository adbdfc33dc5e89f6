// rows - everything that happens to a row of activations before a matrix product, in one pass.
//
// rows - x' = round(H(rms_norm(silu(sum x + term) * up)))   each part optional (kernels.h, RowsJob)
// Shapes    x, term, up [rows, cols] f32; codes [rows, padded_cols] s8, scales [group, row] f32
// Work      a block of threads a row, or 512 columns of one of few; it stays in shared memory
// between
//           the parts; a warp rounds a group, or 128 columns. Of few rows a transform with a base
//           matrix is two kernels of many blocks: butterflies of the parts, then the base matrix
// Memory    each input read once, each wanted result written once -> DRAM in prefill; decode is
//           one row, so one block: latency
// Constants 32 floats + 1 of padding in shared memory: the butterflies of neighbouring elements
//           meet no bank twice
// Requires  a row fits shared memory: cols <= 24,000 on any device, 56,000 on sm_90 and sm_80 / 2
// Error     sums of squares in double (below half an ulp of f32); all else takes the CPU's
//           operations in the CPU's order: bit for bit but for exp (2 ulp).
//           tests/test_cuda_ops.cpp; rounding: tests/test_cuda_linears.cpp
// Source    docs/format.md, "Rounding of activations"; radix-8 butterflies as in any FFT
#include <algorithm>
#include <type_traits>

#include "cuda/device.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kChunk = 512;  // columns of a block where several share a row: whole groups

__host__ __device__ constexpr int padded_index(int i) {
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
  // largest: the greatest |x|; first: the first x of that magnitude, for all codes; above, below:
  // the greatest x and -x, not below 0, for asymmetric ones.
  __device__ GroupScale(const RowsJob& job, float largest, float first, float above, float below) {
    const float half = static_cast<float>(1 << (job.bits - 1));
    high = half - 1;
    if (job.act_codes == ActCodes::kAsymmetric) {
      const float steps = 2 * half - 1;
      below *= job.clip;
      const float range = isnan(largest) ? largest : above * job.clip + below;
      inverse = range > 0 ? steps / range : 0.0f;
      const float place = below * inverse;
      const float zero = ((place < steps ? place : steps) + kRoundMagic) - kRoundMagic;
      scale = range / steps;
      low = -zero;
      high = steps - zero;
    } else if (job.act_codes == ActCodes::kAll) {
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
  // Two-level scales, as cpu/round_scale.h has them. Returns the multiple, with the scale's sign.
  __device__ float restrict_to(float unit) {
    if (unit == 0) return 1.0f;
    const float wanted = scale / unit;
    const float nearest = (fabsf(wanted) + kRoundMagic) - kRoundMagic;
    const float bounded = nearest > 1 ? fminf(nearest, kMostMultiple) : 1.0f;  // 1 for NaN
    const float multiple = wanted < 0 ? -bounded : bounded;
    scale = multiple * unit;
    inverse = 1 / scale;
    return multiple;
  }
  __device__ float code(float x) const {
    const float scaled = x * inverse;
    const float above = scaled > low ? scaled : low;  // also the answer for NaN
    const float bounded = above < high ? above : high;
    return (bounded + kRoundMagic) - kRoundMagic;
  }
};

// kRadix = 2^n: n butterfly stages, strides 2^log_half, twice that, ..., on all of the row.
template <int kRadix>
__device__ void butterfly_pass(float* v, int count, int log_half) {
  const int half = 1 << log_half;
  for (int item = threadIdx.x; item < count / kRadix; item += blockDim.x) {
    const int first = (item >> log_half << log_half) * kRadix + (item & (half - 1));
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

// One row of the base matrix times the m elements at one place.
template <int kM>
__device__ inline float signed_sum(const float* base_row, const float (&parts)[kM]) {
  float sum = base_row[0] * parts[0];
#pragma unroll
  for (int i = 1; i < kM; ++i) sum = fmaf(base_row[i], parts[i], sum);
  return sum;
}

// The last step of a transform in place: element i of each of the m parts of a block becomes a
// signed sum of the m elements at the same place. kM = m: they are in registers; 0: any m, from `v`
// to `to`.
template <int kM>
__device__ void base_stage(const RowsJob& job, float* v, const float* base) {
  const int inner = static_cast<int>(job.block) / kM;
  const int n_places = static_cast<int>(job.cols) / kM;
  for (int place = threadIdx.x; place < n_places; place += blockDim.x) {
    const int first = place / inner * static_cast<int>(job.block) + place % inner;
    float parts[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) parts[i] = v[padded_index(first + i * inner)];
#pragma unroll 4
    for (int row = 0; row < kM; ++row) {
      v[padded_index(first + row * inner)] = signed_sum<kM>(base + row * kM, parts);
    }
  }
  __syncthreads();
}
template <>
__device__ void base_stage<0>(const RowsJob& job, float* v, const float*) {
  const int m = static_cast<int>(job.base_order), block = static_cast<int>(job.block);
  const int inner = block / m, step = job.inverse ? 1 : m;
  float* to = job.transformed + blockIdx.x * job.cols;
  for (int i = threadIdx.x; i < job.cols; i += blockDim.x) {
    const int first = i / block * block, row = (i - first) / inner, place = (i - first) % inner;
    const int8_t* signs = job.base + (job.inverse ? row * m : row);
    float sum = 0;
    for (int from = 0; from < m; ++from) {
      const float term = v[padded_index(first + from * inner + place)];
      const float signed_term = signs[from * step] < 0 ? -term : term;
      sum = from == 0 ? signed_term : sum + signed_term;
    }
    to[i] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < job.cols; i += blockDim.x) v[padded_index(i)] = to[i];
  __syncthreads();
}

constexpr int kMaxBase = 36;  // largest base matrix that stands in shared memory
__host__ __device__ constexpr bool base_in_registers(int64_t m) {
  return m == 12 || m == 20 || m == 28 || m == 36;
}

// The base matrix in the order that base_stage<m> sums: base[row * m + from].
__device__ void load_base(const RowsJob& job, float* base) {
  const int m = static_cast<int>(job.base_order);
  for (int i = threadIdx.x; i < m * m; i += blockDim.x) {
    base[i] = job.base[job.inverse ? i : i % m * m + i / m];
  }
}

__device__ void random_signs(const RowsJob& job, int begin, int end, float* v) {
  for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {
    if (job.signs[i] < 0) v[padded_index(i - begin)] = -v[padded_index(i - begin)];
  }
}

// All butterflies of columns [begin, end) in shared memory. They never leave a part of 2^k
// elements, and those tile the row.
__device__ void butterflies(const RowsJob& job, int count, float* v) {
  const int log_inner = 31 - __clz(static_cast<int>(job.block) / static_cast<int>(job.base_order));
  int log_half = 0;
  for (; log_half + 3 <= log_inner; log_half += 3) butterfly_pass<8>(v, count, log_half);
  if (log_half + 2 == log_inner) {
    butterfly_pass<4>(v, count, log_half);
  } else if (log_half + 1 == log_inner) {
    butterfly_pass<2>(v, count, log_half);
  }
}

// The row in shared memory, transformed in place; a copy goes to job.transformed.
__device__ void hadamard(const RowsJob& job, float* v) {
  const int cols = static_cast<int>(job.cols), m = static_cast<int>(job.base_order);
  __shared__ float base[kMaxBase * kMaxBase];
  if (base_in_registers(m)) load_base(job, base);
  if (job.signs && !job.inverse) random_signs(job, 0, cols, v);
  __syncthreads();
  butterflies(job, cols, v);
  switch (m) {
    case 1:
      break;
    case 12:
      base_stage<12>(job, v, base);
      break;
    case 20:
      base_stage<20>(job, v, base);
      break;
    case 28:
      base_stage<28>(job, v, base);
      break;
    case 36:
      base_stage<36>(job, v, base);
      break;
    default:
      base_stage<0>(job, v, base);
  }
  float* to = job.transformed + blockIdx.x * job.cols;
  for (int i = threadIdx.x; i < cols; i += blockDim.x) {
    const float x = v[padded_index(i)] * job.hadamard_scale;
    v[padded_index(i)] = to[i] = job.signs && job.inverse && job.signs[i] < 0 ? -x : x;
  }
  __syncthreads();
}

// One group of any size by a warp. `at(i)` is the value of column i.
template <typename At>
__device__ void round_group(const RowsJob& job, int64_t row, int group, float unit, const At& at) {
  const RoundedRows& to = job.rounded;
  const int lane = threadIdx.x % kWarp, size = job.level_group > 0 ? job.level_group : to.group;
  const int begin = group * size, end = min(begin + size, static_cast<int>(job.cols));
  // The bit pattern of |x| orders like |x|, NaN above infinity.
  uint32_t largest = 0;
  for (int i = begin + lane; i < end; i += kWarp) {
    largest = max(largest, __float_as_uint(at(i)) & 0x7FFFFFFFu);
  }
  largest = __reduce_max_sync(kFullMask, largest);
  unsigned first = 0xFFFFFFFFu;
  for (int i = begin + lane; i < end; i += kWarp) {
    if ((__float_as_uint(at(i)) & 0x7FFFFFFFu) != largest) continue;
    first = static_cast<unsigned>(i);
    break;
  }
  first = __reduce_min_sync(kFullMask, first);
  float above = 0, below = 0;
  if (job.act_codes == ActCodes::kAsymmetric) {
    for (int i = begin + lane; i < end; i += kWarp) {
      above = fmaxf(above, at(i));
      below = fmaxf(below, -at(i));
    }
    above = warp_max(above);
    below = warp_max(below);
  }
  GroupScale by(job, __uint_as_float(largest), at(first), above, below);
  const float multiple = by.restrict_to(unit);
  if (lane == 0 && job.level_group == 0) to.scales[scale_offset(to, row, group)] = by.scale;
  for (int i = begin + lane; i < end; i += kWarp) {
    const float code = by.code(at(i));
    to.codes[code_offset(to, row, i)] = code_byte(to.order, code * multiple);
    if (job.expanded) job.expanded[row * job.cols + i] = by.scale * code;
  }
}

// Groups of 32, 64 or 128 columns, whole ones: four columns a lane, 128 columns a warp.
template <typename At>
__device__ void round_stretch(const RowsJob& job, int64_t row, int stretch, float unit,
                              const At& at) {
  const RoundedRows& to = job.rounded;
  const int lane = threadIdx.x % kWarp;
  const int lanes = (job.level_group > 0 ? job.level_group : to.group) / 4;  // of a group
  const int col = stretch * 128 + lane * 4;
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
  float above = 0, below = 0;
  if (job.act_codes == ActCodes::kAsymmetric) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      above = fmaxf(above, x[i]);
      below = fmaxf(below, -x[i]);
    }
    for (int step = lanes / 2; step > 0; step /= 2) {
      above = fmaxf(above, __shfl_xor_sync(kFullMask, above, step));
      below = fmaxf(below, __shfl_xor_sync(kFullMask, below, step));
    }
  }
  GroupScale by(job, __uint_as_float(largest), __uint_as_float(largest | first << 31), above,
                below);
  const float multiple = by.restrict_to(unit);
  if (inside && lane % lanes == 0 && job.level_group == 0) {
    to.scales[scale_offset(to, row, col >> to.group_shift)] = by.scale;
  }
  float* expanded = job.expanded && inside ? job.expanded + row * job.cols + col : nullptr;
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float code = by.code(x[i]);
    codes |= uint32_t{code_byte(to.order, code * multiple)} << 8 * i;
    if (expanded) expanded[i] = by.scale * code;
  }
  bool stored = inside;
  if (to.order == CodeOrder::kTilesFp8) {
    // Of 8 columns the even lane stores 0 4 1 5, the odd one 2 6 3 7.
    const uint32_t other = __shfl_xor_sync(kFullMask, codes, 1);
    codes = lane % 2 ? __byte_perm(other, codes, 0x7362) : __byte_perm(codes, other, 0x5140);
    stored = (col & ~7) < job.cols;
  }
  const int first_of_lane = to.order == CodeOrder::kTilesFp8 && lane % 2 ? col - 2 : col;
  if (stored) *reinterpret_cast<uint32_t*>(to.codes + code_offset(to, row, first_of_lane)) = codes;
}

// What the two-level scales of a row are multiples of, for a block of threads with all of its
// columns; 0: any scale will do.
template <typename At>
__device__ float row_unit(const RowsJob& job, int64_t row, const At& at) {
  if (job.level_group == 0) return 0;
  __shared__ uint32_t shared;
  if (threadIdx.x == 0) shared = 0;
  __syncthreads();
  uint32_t largest = 0;
  for (int i = threadIdx.x; i < job.cols; i += blockDim.x) {
    largest = max(largest, __float_as_uint(at(i)) & 0x7FFFFFFFu);
  }
  largest = __reduce_max_sync(kFullMask, largest);
  if (threadIdx.x % kWarp == 0) atomicMax(&shared, largest);
  __syncthreads();
  const float magnitude = __uint_as_float(shared);
  const GroupScale whole(job, magnitude, magnitude, 0, 0);
  const float unit = fabsf(whole.scale) / kMostMultiple;
  if (threadIdx.x == 0) job.rounded.scales[scale_offset(job.rounded, row, 0)] = unit;
  return unit;
}

// Columns [begin, end) of a row.
template <typename At>
__device__ void round_row(const RowsJob& job, int64_t row, int begin, int end, const At& at) {
  const float unit = row_unit(job, row, at);
  const int group = job.level_group > 0 ? job.level_group : job.rounded.group;
  const int warp = threadIdx.x / kWarp, n_warps = blockDim.x / kWarp;
  const int cols = static_cast<int>(job.cols);
  if ((group == 32 || group == 64 || group == 128) && cols % 4 == 0) {
    for (int i = begin / 128 + warp; i * 128 < end; i += n_warps) {
      round_stretch(job, row, i, unit, at);
    }
  } else {  // one block a row
    const int n_groups = (cols + group - 1) / group;
    for (int i = warp; i < n_groups; i += n_warps) round_group(job, row, i, unit, at);
  }
  if (end < cols) return;
  // The padding: codes, and the scales of groups that are nothing else.
  for (int i = cols + threadIdx.x; i < job.rounded.padded_cols; i += blockDim.x) {
    job.rounded.codes[code_offset(job.rounded, row, i)] = 0;
  }
  const int n_used = job.level_group > 0 ? 1 : (cols + group - 1) / group;
  for (int i = n_used + threadIdx.x; i < job.rounded.n_groups; i += blockDim.x) {
    job.rounded.scales[scale_offset(job.rounded, row, i)] = 0.0f;
  }
}

// Elements [at, at + kCount) on their way into shared memory, element i there; the sum of their
// squares. Not `own`: another block's, wanted for the squares only.
template <int kCount>
__device__ double load_elements(const RowsJob& job, int64_t at, int i, bool own, float* v) {
  using Vector = std::conditional_t<kCount == 4, float4, float>;
  const auto get = [&](const float* from) { return *reinterpret_cast<const Vector*>(from + at); };
  Vector vector = get(job.x);
  float* x = reinterpret_cast<float*>(&vector);
  for (int64_t part = 1; part < job.n_parts; ++part) {
    const Vector more = get(job.x + part * job.rows * job.cols);
    for (int j = 0; j < kCount; ++j) x[j] += reinterpret_cast<const float*>(&more)[j];
  }
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
    if (job.gain) squares += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    if (own) v[padded_index(i + j)] = x[j];
  }
  return squares;
}

// kTransform false: the short program of a decode step, which is at work before a long one is read.
template <bool kTransform>
__global__ void __launch_bounds__(1024)
    rows_kernel(const __grid_constant__ RowsJob job, int chunk) {
  extern __shared__ float v[];  // columns [begin, end)
  __shared__ double sums[kWarp];
  const int64_t row = blockIdx.x, first = row * job.cols;
  const int cols = static_cast<int>(job.cols);
  const int begin = blockIdx.y * chunk, end = min(begin + chunk, cols);
  // No kernel writes these.
  const int first_col = begin + threadIdx.x;
  const float first_gain = job.gain && first_col < end ? job.gain[first_col] : 0.0f;
  if constexpr (kTransform) {
    for (int i = begin + threadIdx.x * 32; job.signs && i < end; i += blockDim.x * 32) {
      prefetch(job.signs + i);
    }
  }
  begin_kernel();
  const auto own = [&](int i) { return i >= begin && i < end; };
  // The norm needs the squares of all columns, also where several blocks share a row.
  const int load_begin = job.gain ? 0 : begin, load_end = job.gain ? cols : end;
  double squares = 0;
  if (cols % 4 == 0) {
#pragma unroll 4
    for (int i = load_begin + threadIdx.x * 4; i < load_end; i += blockDim.x * 4) {
      squares += load_elements<4>(job, first + i, i - begin, own(i), v);
    }
  } else {
    for (int i = load_begin + threadIdx.x; i < load_end; i += blockDim.x) {
      squares += load_elements<1>(job, first + i, i - begin, own(i), v);
    }
  }
  if (job.gain) {
    const double mean = block_sum(squares, sums) / static_cast<double>(job.cols);
    const float factor = static_cast<float>(1.0 / sqrt(mean + static_cast<double>(job.eps)));
    for (int i = first_col; i < end; i += blockDim.x) {
      const float gain = i == first_col ? first_gain : job.gain[i];
      const float x = v[padded_index(i - begin)] * factor * gain;
      if (job.normed) job.normed[first + i] = x;
      v[padded_index(i - begin)] = x;
    }
  }
  __syncthreads();
  if constexpr (kTransform) {
    if (chunk < cols) {  // a part of the row; base_kernel does the rest
      if (job.signs && !job.inverse) random_signs(job, begin, end, v);
      __syncthreads();
      butterflies(job, end - begin, v);
      for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {
        job.transformed[first + i] = v[padded_index(i - begin)];
      }
      return;
    }
    hadamard(job, v);
  }
  if (job.bits >= 16) return;
  round_row(job, row, begin, end, [&](int i) { return v[padded_index(i - begin)]; });
}

constexpr int kPlaces = 128, kBaseWarps = 12;

// Few rows: the base matrix on kPlaces places of every part of a block, and the rounding of what
// comes out, whose stretches of 128 columns lie inside the parts.
template <int kM>
__global__ void __launch_bounds__(kBaseWarps* kWarp)
    base_kernel(const __grid_constant__ RowsJob job) {
  __shared__ float base[kM * kM], v[kM][kPlaces];
  load_base(job, base);
  begin_kernel();
  const int64_t row = blockIdx.x;
  const int block = static_cast<int>(job.block), inner = block / kM;
  const int stretches = inner / kPlaces;  // of a part
  const int first = blockIdx.y / stretches * block + blockIdx.y % stretches * kPlaces;
  float* at = job.transformed + row * job.cols + first;
  constexpr int kTurns = kBaseWarps * kWarp / kPlaces;  // threads of a place
  const int place = threadIdx.x % kPlaces, turn = threadIdx.x / kPlaces;
  float parts[kM];
#pragma unroll
  for (int i = 0; i < kM; ++i) parts[i] = at[i * inner + place];
  __syncthreads();  // everyone has read, base is there
  for (int to = turn; to < kM; to += kTurns) {
    const float sum = signed_sum<kM>(base + to * kM, parts) * job.hadamard_scale;
    const int col = first + to * inner + place;
    v[to][place] = job.signs && job.inverse && job.signs[col] < 0 ? -sum : sum;
    at[to * inner + place] = v[to][place];
  }
  if (job.bits >= 16) return;
  __syncthreads();
  for (int to = threadIdx.x / kWarp; to < kM; to += kBaseWarps) {
    const int begin = first + to * inner;
    round_stretch(job, row, begin / 128, 0.0f, [&](int col) { return v[to][col - begin]; });
  }
}

// Whether one row's transform is shared out over many blocks of threads: rows_kernel, then
// base_kernel.
bool transform_is_divided(const RowsJob& job) {
  const int64_t inner = job.block / std::max<int64_t>(job.base_order, 1);
  const int group = job.rounded.group;
  const bool rounds = job.bits < 16;
  return job.rows <= kMatvecRows && job.block > 0 && base_in_registers(job.base_order) &&
         inner % kPlaces == 0 && !job.gain &&
         (!rounds || group == 32 || group == 64 || group == 128);
}

}  // namespace

void launch_rows(const RowsJob& job, const Gpu& gpu) {
  TQ_CHECK(job.block == 0 || job.transformed, "a transformed row needs a place");
  if (job.rows == 0) return;
  // Few rows are latency: several blocks share one, where no block needs what another one writes.
  const bool whole_groups = job.bits >= 16 || job.rounded.group <= 128;
  const bool in_place = job.gain && (job.term || job.up || job.normed == job.x);
  const bool two_steps = transform_is_divided(job);
  const bool divided = job.rows <= kMatvecRows && job.block == 0 && whole_groups && !in_place &&
                       job.cols % kChunk == 0;
  const int chunk = static_cast<int>(two_steps ? job.block / job.base_order
                                     : divided ? kChunk
                                               : job.cols);
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
      gpu, "rows", job.block > 0 ? rows_kernel<true> : rows_kernel<false>,
      dim3(static_cast<unsigned>(job.rows), static_cast<unsigned>((job.cols + chunk - 1) / chunk)),
      dim3(static_cast<unsigned>(threads)), shared, job, chunk);
  if (!two_steps) return;
  const auto kernel = job.base_order == 12   ? base_kernel<12>
                      : job.base_order == 20 ? base_kernel<20>
                      : job.base_order == 28 ? base_kernel<28>
                                             : base_kernel<36>;
  const int64_t n_blocks = job.cols / job.base_order / kPlaces;
  launch_kernel(gpu, "rows", kernel,
                dim3(static_cast<unsigned>(job.rows), static_cast<unsigned>(n_blocks)),
                dim3(kBaseWarps * kWarp), 0, job);
}

}  // namespace tq::cuda
