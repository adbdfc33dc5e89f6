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
    const float bounded = fminf(fmaxf(scaled, low), high);  // low for NaN
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

/// Four small whole numbers as the bytes that stand for them.
__device__ inline uint32_t code_bytes(CodeOrder order, const float (&codes)[4]) {
  if (order == CodeOrder::kTilesFp8) {
    const uint32_t low =
        __nv_cvt_float2_to_fp8x2(make_float2(codes[0], codes[1]), __NV_SATFINITE, __NV_E4M3);
    const uint32_t high =
        __nv_cvt_float2_to_fp8x2(make_float2(codes[2], codes[3]), __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
  }
  // The lowest byte of code + kRoundMagic: a conversion instruction takes eight times as long.
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(codes[i] + kRoundMagic);
  return __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040),
                     0x5410);
}

// Where the codes of a lane go that has four columns of each stretch of 128: of stretch 0, and how
// much further those of the next one.
struct StretchPlace {
  uint8_t* codes;
  int64_t step;
  __device__ StretchPlace(const RoundedRows& to, int64_t row) {
    int col = threadIdx.x % kWarp * 4;
    if (to.order == CodeOrder::kTilesFp8 && threadIdx.x % 2 == 1) col -= 2;
    codes = to.codes + code_offset(to, row, col);
    step = to.order == CodeOrder::kLanes ? 128 : kRowStep * kBlockCols;
  }
};

// Rounds a lane's four columns of a stretch; those behind the row's end are left out.
__device__ inline void store_codes(const RowsJob& job, int64_t row, const StretchPlace& place,
                                   int stretch, const GroupScale& by, float multiple,
                                   const float (&x)[4]) {
  const int col = stretch * 128 + threadIdx.x % kWarp * 4;
  const bool odd = threadIdx.x % 2 == 1, inside = col < job.cols;
  const CodeOrder order = job.rounded.order;
  float codes[4], multiples[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    codes[i] = by.code(x[i]);
    multiples[i] = codes[i] * multiple;
  }
  if (job.expanded && inside) {
    float* expanded = job.expanded + row * job.cols + col;
#pragma unroll
    for (int i = 0; i < 4; ++i) expanded[i] = by.scale * codes[i];
  }
  uint32_t bytes = code_bytes(order, multiples);
  bool stored = inside;
  if (order == CodeOrder::kTilesFp8) {
    // Of 8 columns the even lane stores 0 4 1 5, the odd one 2 6 3 7.
    const uint32_t other = __shfl_xor_sync(kFullMask, bytes, 1);
    bytes = odd ? __byte_perm(other, bytes, 0x7362) : __byte_perm(bytes, other, 0x5140);
    stored = (col & ~7) < job.cols;
  }
  if (stored) *reinterpret_cast<uint32_t*>(place.codes + stretch * place.step) = bytes;
}

// Groups of 32, 64 or 128 columns, whole ones, by a warp: x is four columns a lane of kCount
// stretches of 128, number `first`, first + step, ... Divisions are long and all lanes of a group
// would do the same: of kCount stretches each lane divides for one.
template <int kCount>
__device__ void round_stretches(const RowsJob& job, int64_t row, int first, int step, float unit,
                                const StretchPlace& place, const float (&x)[kCount][4]) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  const RoundedRows& to = job.rounded;
  const int lane = threadIdx.x % kWarp;
  const int lanes = (job.level_group > 0 ? job.level_group : to.group) / 4;  // of a group
  const int group_begin = lane & ~(lanes - 1);
  const unsigned group_mask = kFullMask >> (kWarp - lanes) << group_begin;
  uint32_t my_largest = 0;
  float my_first = 0, my_above = 0, my_below = 0;
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    uint32_t magnitudes[4], largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      magnitudes[i] = __float_as_uint(x[s][i]) & 0x7FFFFFFFu;
      largest = max(largest, magnitudes[i]);
    }
#pragma unroll
    for (int step_lanes = 16; step_lanes > 0; step_lanes /= 2) {
      if (step_lanes < lanes) {
        largest = max(largest, __shfl_xor_sync(kFullMask, largest, step_lanes));
      }
    }
    // Of the columns of that magnitude the first has the sign.
    bool found = false, negative = false;
#pragma unroll
    for (int i = 3; i >= 0; --i) {
      if (magnitudes[i] != largest) continue;
      found = true;
      negative = __float_as_int(x[s][i]) < 0;
    }
    const unsigned finders = __ballot_sync(kFullMask, found) & group_mask;
    const unsigned negatives = __ballot_sync(kFullMask, negative);
    const bool divides = lane % kCount == s;
    if (divides) {
      my_largest = largest;
      my_first =
          finders & -finders & negatives ? -__uint_as_float(largest) : __uint_as_float(largest);
    }
    if (job.act_codes == ActCodes::kAsymmetric) {
      float above = 0, below = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        above = fmaxf(above, x[s][i]);
        below = fmaxf(below, -x[s][i]);
      }
      for (int step_lanes = lanes / 2; step_lanes > 0; step_lanes /= 2) {
        above = fmaxf(above, __shfl_xor_sync(kFullMask, above, step_lanes));
        below = fmaxf(below, __shfl_xor_sync(kFullMask, below, step_lanes));
      }
      if (divides) my_above = above, my_below = below;
    }
  }
  GroupScale mine(job, __uint_as_float(my_largest), my_first, my_above, my_below);
  const float my_multiple = mine.restrict_to(unit);
  const int my_col = (first + lane % kCount * step) * 128 + group_begin * 4;
  if (my_col < job.cols && lane - group_begin < kCount && job.level_group == 0) {
    to.scales[scale_offset(to, row, my_col >> to.group_shift)] = mine.scale;
  }
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    const int source = (lane & ~(kCount - 1)) + s;
    const auto of_group = [&](float value) {
      return kCount == 1 ? value : __shfl_sync(kFullMask, value, source);
    };
    GroupScale by = mine;
    by.inverse = of_group(mine.inverse);
    const float multiple = of_group(my_multiple);
    if (job.act_codes == ActCodes::kAsymmetric) {
      by.low = of_group(mine.low);
      by.high = of_group(mine.high);
    }
    if (job.expanded) by.scale = of_group(mine.scale);
    store_codes(job, row, place, first + s * step, by, multiple, x[s]);
  }
}

// One stretch; `at(i)` is the value of column i.
template <typename At>
__device__ void round_stretch(const RowsJob& job, int64_t row, int stretch, float unit,
                              const At& at) {
  const int col = stretch * 128 + threadIdx.x % kWarp * 4;
  float x[1][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) x[0][i] = col < job.cols ? at(col + i) : 0.0f;
  round_stretches<1>(job, row, stretch, 1, unit, StretchPlace(job.rounded, row), x);
}

// What the two-level scales of a row are multiples of, by its greatest magnitude; thread 0 stores
// it.
__device__ inline float store_unit(const RowsJob& job, int64_t row, float magnitude) {
  const GroupScale whole(job, magnitude, magnitude, 0, 0);
  const float unit = fabsf(whole.scale) / kMostMultiple;
  if (threadIdx.x == 0) job.rounded.scales[scale_offset(job.rounded, row, 0)] = unit;
  return unit;
}

// The same for a block of threads with all columns of a row; 0: any scale will do.
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
  return store_unit(job, row, __uint_as_float(shared));
}

// What stands behind the last column: codes, and the scales of groups that are nothing else.
__device__ inline void round_padding(const RowsJob& job, int64_t row) {
  const RoundedRows& to = job.rounded;
  const int cols = static_cast<int>(job.cols);
  for (int i = cols + threadIdx.x; i < to.padded_cols; i += blockDim.x) {
    to.codes[code_offset(to, row, i)] = 0;
  }
  const int n_used = job.level_group > 0 ? 1 : (cols + to.group - 1) / to.group;
  for (int i = n_used + threadIdx.x; i < to.n_groups; i += blockDim.x) {
    to.scales[scale_offset(to, row, i)] = 0.0f;
  }
}

// Groups that round_stretches() takes.
__host__ __device__ inline bool whole_stretches(const RowsJob& job) {
  const int group = job.level_group > 0 ? job.level_group : job.rounded.group;
  return (group == 32 || group == 64 || group == 128) && job.cols % 4 == 0;
}

// Columns [begin, end) of a row.
template <typename At>
__device__ void round_row(const RowsJob& job, int64_t row, int begin, int end, const At& at) {
  const float unit = row_unit(job, row, at);
  const int warp = threadIdx.x / kWarp, n_warps = blockDim.x / kWarp;
  const int cols = static_cast<int>(job.cols);
  if (whole_stretches(job)) {
    for (int i = begin / 128 + warp; i * 128 < end; i += n_warps) {
      round_stretch(job, row, i, unit, at);
    }
  } else {  // one block a row
    const int group = job.level_group > 0 ? job.level_group : job.rounded.group;
    const int n_groups = (cols + group - 1) / group;
    for (int i = warp; i < n_groups; i += n_warps) round_group(job, row, i, unit, at);
  }
  if (end == cols) round_padding(job, row);
}

}  // namespace tq::cuda
