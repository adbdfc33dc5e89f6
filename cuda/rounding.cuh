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
  float multiple = 1.0f;  // of two-level scales, with the scale's sign
  // largest: the greatest |x|; first: the first x of that magnitude, for all codes; above, below:
  // the greatest x and -x, not below 0, for asymmetric ones.
  __device__ GroupScale(const RowsJob& job, float largest, float first, float above, float below) {
    const float half = static_cast<float>(1 << (job.bits - 1));
    const bool asymmetric = job.act_codes == ActCodes::kAsymmetric;
    float range, steps;  // what the codes reach over, and how many
    if (asymmetric) {
      below *= job.clip;
      range = isnan(largest) ? largest : above * job.clip + below;
      steps = 2 * half - 1;
    } else if (job.act_codes == ActCodes::kAll) {
      range = -(first * job.clip);
      steps = half;
    } else {
      range = largest * job.clip;
      steps = half - 1;
    }
    scale = range / steps;
    inverse = range < 0 || range > 0 ? steps / range : 0.0f;  // 0 for NaN
    low = -steps;
    high = half - 1;
    if (asymmetric) {
      const float place = below * inverse;
      const float zero = ((place < steps ? place : steps) + kRoundMagic) - kRoundMagic;
      low = -zero;
      high = steps - zero;
    }
  }
  // Two-level scales, as cpu/round_scale.h has them: a multiple of `unit`, unless that is 0.
  // Returns the multiple.
  __device__ float restrict_to(float unit) {
    if (unit == 0) return multiple;
    const float wanted = scale / unit;
    const float nearest = (fabsf(wanted) + kRoundMagic) - kRoundMagic;
    const float bounded = nearest > 1 ? fminf(nearest, kMostMultiple) : 1.0f;  // 1 for NaN
    multiple = wanted < 0 ? -bounded : bounded;
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
  by.restrict_to(unit);
  if (lane == 0 && job.level_group == 0) to.scales[scale_offset(to, row, group)] = by.scale;
  for (int i = begin + lane; i < end; i += kWarp) {
    const float code = by.code(at(i));
    to.codes[code_offset(to, row, i)] = code_byte(to.order, code * by.multiple);
    if (job.expanded) job.expanded[row * job.cols + i] = by.scale * code;
  }
}

// Where the codes of a lane go that has four columns of each stretch of 128: of stretch 0, and how
// much further those of the next one.
struct StretchPlace {
  uint8_t* codes;
  int step;
  __device__ StretchPlace(const RoundedRows& to, int64_t row) {
    int col = threadIdx.x % kWarp * 4;
    if (to.order == CodeOrder::kTilesFp8 && threadIdx.x % 2 == 1) col -= 2;
    codes = to.codes + code_offset(to, row, col);
    step = to.order == CodeOrder::kLanes ? 128 : kRowStep * kBlockCols;
  }
};

// The codes of a lane's four columns of a stretch, to `codes` if `stored`. kFp8: the order is
// kTilesFp8, so that multiples are 1.
template <bool kFp8>
__device__ inline void store_codes(const GroupScale& by, const float (&x)[4], bool stored,
                                   uint8_t* codes) {
  uint32_t bytes;
  if constexpr (kFp8) {
    const auto pair = [&](float a, float b) -> uint32_t {
      return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
    };
    bytes = pair(by.code(x[0]), by.code(x[1])) | pair(by.code(x[2]), by.code(x[3])) << 16;
    // Of 8 columns the even lane stores 0 4 1 5, the odd one 2 6 3 7.
    const uint32_t other = __shfl_xor_sync(kFullMask, bytes, 1);
    bytes = threadIdx.x % 2 == 1 ? __byte_perm(other, bytes, 0x7362)
                                 : __byte_perm(bytes, other, 0x5140);
  } else {
    // The lowest byte of a whole number + kRoundMagic; a conversion takes eight times as long.
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits[i] = __float_as_uint(fmaf(by.code(x[i]), by.multiple, kRoundMagic));
    }
    bytes = __byte_perm(__byte_perm(bits[0], bits[1], 0x0040),
                        __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
  }
  if (stored) *reinterpret_cast<uint32_t*>(codes) = bytes;
}

__device__ inline void store_expanded(const RowsJob& job, int64_t row, int col,
                                      const GroupScale& by, const float (&x)[4]) {
  if (col >= job.cols) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) job.expanded[row * job.cols + col + i] = by.scale * by.code(x[i]);
}

// The greatest of values[lane % kCount] of the lanes of a group; values are lost. Each step halves
// how many values a lane looks after.
template <int kCount, typename T>
__device__ inline T scattered_max(T (&values)[kCount], int lanes) {
#pragma unroll
  for (int left = kCount / 2, step = 1; left > 0; left /= 2, step *= 2) {
    const bool odd = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const T mine = odd ? values[2 * i + 1] : values[2 * i];
      const T given = odd ? values[2 * i] : values[2 * i + 1];
      values[i] = max(mine, __shfl_xor_sync(kFullMask, given, step));
    }
  }
  T value = values[0];
#pragma unroll
  for (int step = kCount; step < kWarp; step *= 2) {
    if (step < lanes) value = max(value, __shfl_xor_sync(kFullMask, value, step));
  }
  return value;
}

// Of a group whose greatest and least number have the same magnitude: whether the first of them is
// negative. For stretch lane % kCount; `largest` is that one's.
template <int kCount>
__device__ bool first_is_negative(const float (&x)[kCount][4], uint32_t largest, int lanes) {
  const int lane = threadIdx.x % kWarp;
  const unsigned group = kFullMask >> (kWarp - lanes) << (lane & ~(lanes - 1));
  bool answer = false;
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    const uint32_t wanted = __shfl_sync(kFullMask, largest, (lane & ~(kCount - 1)) + s);
    bool found = false, negative = false;
#pragma unroll
    for (int i = 3; i >= 0; --i) {
      if ((__float_as_uint(x[s][i]) & 0x7FFFFFFFu) != wanted) continue;
      found = true;
      negative = __float_as_int(x[s][i]) < 0;
    }
    const unsigned finders = __ballot_sync(kFullMask, found) & group;
    const unsigned negatives = __ballot_sync(kFullMask, negative);
    if (lane % kCount == s) answer = (finders & -finders & negatives) != 0;
  }
  return answer;
}

// Rounds by what the lanes know: each that of its group in stretch first + lane % kCount.
template <bool kFp8, int kCount>
__device__ void store_stretches(const RowsJob& job, int64_t row, int first,
                                const StretchPlace& place, const GroupScale& mine,
                                const float (&x)[kCount][4]) {
  const int lane = threadIdx.x % kWarp, cols = static_cast<int>(job.cols);
  const bool asymmetric = job.act_codes == ActCodes::kAsymmetric;
  uint8_t* codes = place.codes + int64_t{first} * place.step;
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    const auto of_group = [&](float value) {
      return kCount == 1 ? value : __shfl_sync(kFullMask, value, (lane & ~(kCount - 1)) + s);
    };
    GroupScale by = mine;
    by.inverse = of_group(mine.inverse);
    if (!kFp8) by.multiple = of_group(mine.multiple);
    if (asymmetric) {
      by.low = of_group(mine.low);
      by.high = of_group(mine.high);
    }
    const int col = (first + s) * 128 + lane * 4;
    if (job.expanded) {
      by.scale = of_group(mine.scale);
      store_expanded(job, row, col, by, x[s]);
    }
    // Eight columns at a time: codes of those behind the end are 0.
    store_codes<kFp8>(by, x[s], (col & ~7) < cols, codes + s * place.step);
  }
}

// Groups of 32, 64 or 128 columns, whole ones, by a warp: x is four columns a lane of stretches
// `first` to first + kCount - 1, 0 behind the row's end. All lanes of a group would divide the same
// numbers, which takes long; of kCount stretches each lane does so for one.
template <int kCount>
__device__ void round_stretches(const RowsJob& job, int64_t row, int first, float unit,
                                const StretchPlace& place, const float (&x)[kCount][4]) {
  const RoundedRows& to = job.rounded;
  const int lane = threadIdx.x % kWarp, cols = static_cast<int>(job.cols);
  const int lanes = (job.level_group > 0 ? job.level_group : to.group) / 4;  // of a group
  // As signed integers the bits of numbers above 0 order like them, above all those below 0; as
  // unsigned ones those of numbers below 0 are on top, and order like their magnitudes.
  int tops[kCount];
  uint32_t bottoms[kCount];
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    tops[s] = __float_as_int(x[s][0]);
    bottoms[s] = __float_as_uint(x[s][0]);
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      tops[s] = max(tops[s], __float_as_int(x[s][i]));
      bottoms[s] = max(bottoms[s], __float_as_uint(x[s][i]));
    }
  }
  const int top = scattered_max(tops, lanes);
  const int bottom = static_cast<int>(scattered_max(bottoms, lanes));
  const bool any_above = top >= 0, any_below = bottom < 0;
  const uint32_t above = any_above ? top : 0, below = any_below ? bottom & 0x7FFFFFFF : 0;
  const uint32_t largest = max(above, below);
  bool negative = any_below && (!any_above || below > above);
  const bool tie = any_above && any_below && above == below;
  if (job.act_codes == ActCodes::kAll && __any_sync(kFullMask, tie)) {
    const bool answer = first_is_negative(x, largest, lanes);
    if (tie) negative = answer;
  }
  const float magnitude = __uint_as_float(largest);
  GroupScale mine(job, magnitude, negative ? -magnitude : magnitude, __uint_as_float(above),
                  __uint_as_float(below));
  mine.restrict_to(unit);
  const int group_begin = lane & ~(lanes - 1);
  const int my_col = (first + lane % kCount) * 128 + group_begin * 4;
  if (job.level_group == 0 && lane - group_begin < kCount && my_col < cols) {
    to.scales[scale_offset(to, row, my_col >> to.group_shift)] = mine.scale;
  }
  to.order == CodeOrder::kTilesFp8 ? store_stretches<true>(job, row, first, place, mine, x)
                                   : store_stretches<false>(job, row, first, place, mine, x);
}

// One stretch; `at(i)` is the value of column i.
template <typename At>
__device__ void round_stretch(const RowsJob& job, int64_t row, int stretch, float unit,
                              const At& at) {
  const int col = stretch * 128 + threadIdx.x % kWarp * 4;
  float x[1][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) x[0][i] = col < job.cols ? at(col + i) : 0.0f;
  round_stretches<1>(job, row, stretch, unit, StretchPlace(job.rounded, row), x);
}

// What the two-level scales of a row are multiples of, by its greatest magnitude.
__device__ inline float level_unit(const RowsJob& job, float magnitude) {
  const GroupScale whole(job, magnitude, magnitude, 0, 0);
  return fabsf(whole.scale) / kMostMultiple;
}

// The same, stored by thread 0.
__device__ inline float store_unit(const RowsJob& job, int64_t row, float magnitude) {
  const float unit = level_unit(job, magnitude);
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
