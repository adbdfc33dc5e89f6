// rounding.cuh - rows to integer codes with a scale a group, as cpu/round_scale.h does it, bit for
// bit.
//
// A warp rounds a group, or 128 columns of groups of 32 to 128; `at(i)` is the value of column i.
// Where rounded.codes and rounded.scales point to is the caller's business.
#pragma once

#include "cuda/device.cuh"

namespace tq::cuda {

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

}  // namespace tq::cuda
