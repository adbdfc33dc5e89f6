// row_block.cuh - a row in the registers of a block of threads: on its way in, its norm, its
// rounding.
//
// A thread has columns `col` to col + 3 of each of kCount neighbouring stretches of 128 (the warp's
// kCount); what lies behind the end of the row is 0.
#pragma once

#include "cuda/rounding.cuh"

namespace tq::cuda {

// x / (1 + exp(-x)) times up. A division is a function call for numbers that might leave the range
// of f32 on the way; for all others these are its own six steps, so the quotient is the same.
__device__ inline void swiglu(float (&x)[4], const float4& up) {
  float below[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) below[i] = 1.0f + expf(-x[i]);
  const float least = fminf(fminf(fabsf(x[0]), fabsf(x[1])), fminf(fabsf(x[2]), fabsf(x[3])));
  const float most = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
  if (least > 0x1p-60f && most < 64.0f) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float inverse;
      asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(below[i]));
      inverse = fmaf(inverse, fmaf(-below[i], inverse, 1.0f), inverse);
      const float quotient = x[i] * inverse;
      x[i] = fmaf(inverse, fmaf(-below[i], quotient, x[i]), quotient);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] /= below[i];
  }
  x[0] *= up.x;
  x[1] *= up.y;
  x[2] *= up.z;
  x[3] *= up.w;
}

template <int kCount>
__device__ void store_columns(const RowsJob& job, int64_t row, int col, const float (&x)[kCount][4],
                              float* to) {
  const int left = static_cast<int>(job.cols) - col;
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    if (s * 128 >= left) continue;
    *reinterpret_cast<float4*>(to + row * job.cols + col + s * 128) =
        make_float4(x[s][0], x[s][1], x[s][2], x[s][3]);
  }
}

// Four columns, `col` and the next three, of each of kCount neighbouring stretches on their way in;
// 0 behind the end of the row.
template <int kCount>
__device__ void load_columns(const RowsJob& job, int64_t row, int col, float (&x)[kCount][4]) {
  const int64_t at = row * job.cols + col;
  const int left = static_cast<int>(job.cols) - col;
  float4 more[kCount];
  const auto get = [&](const float* from) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      more[s] = make_float4(0, 0, 0, 0);
      if (s * 128 < left) more[s] = *reinterpret_cast<const float4*>(from + at + s * 128);
    }
  };
  const auto add = [&] {
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      x[s][0] += more[s].x;
      x[s][1] += more[s].y;
      x[s][2] += more[s].z;
      x[s][3] += more[s].w;
    }
  };
  get(job.x);
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    x[s][0] = more[s].x, x[s][1] = more[s].y, x[s][2] = more[s].z, x[s][3] = more[s].w;
  }
  for (int64_t part = 1; part < job.n_parts; ++part) {
    get(job.x + part * job.rows * job.cols);
    add();
  }
  if (job.term) {
    get(job.term);
    add();
  }
  if (job.up) {
    get(job.up);
#pragma unroll
    for (int s = 0; s < kCount; ++s) swiglu(x[s], more[s]);
  }
  if (job.sum) store_columns(job, row, col, x, job.sum);
}

__device__ inline uint32_t magnitude(float x) {
  return __float_as_uint(x) & 0x7FFFFFFFu;
}

// fmaxf that hands on what is not a number.
__device__ inline float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// The greatest of a block of threads; every thread gets it.
__device__ inline uint32_t block_max(uint32_t value) {
  __shared__ uint32_t scratch[kWarp];
  const int lane = threadIdx.x % kWarp;
  value = __reduce_max_sync(kFullMask, value);
  __syncthreads();  // scratch is free
  if (lane == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  return __reduce_max_sync(kFullMask, lane < blockDim.x / kWarp ? scratch[lane] : 0);
}

// A whole row of one group; `batches` as below.
template <int kCount, typename Batches>
__device__ void round_one_group(const RowsJob& job, int64_t row, uint32_t largest, float unit,
                                const Batches& batches) {
  const int lane = threadIdx.x % kWarp, cols = static_cast<int>(job.cols);
  uint32_t first = 0;  // ~(2 * column + sign) of the first of that magnitude
  float above = 0, below = 0;
  batches([&](int stretch, const float(&x)[kCount][4]) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int col = (stretch + s) * 128 + lane * 4 + i;
        if (magnitude(x[s][i]) == largest && col < cols) {
          first = max(first, ~(2u * col + (__float_as_uint(x[s][i]) >> 31)));
        }
        above = fmaxf(above, x[s][i]);
        below = fmaxf(below, -x[s][i]);
      }
    }
  });
  first = ~block_max(first);
  if (job.act_codes == ActCodes::kAsymmetric) {
    above = __uint_as_float(block_max(__float_as_uint(above)));
    below = __uint_as_float(block_max(__float_as_uint(below)));
  }
  GroupScale by(job, __uint_as_float(largest), __uint_as_float(largest | first << 31), above,
                below);
  by.restrict_to(unit);
  if (threadIdx.x == 0 && job.level_group == 0) {
    job.rounded.scales[scale_offset(job.rounded, row, 0)] = by.scale;
  }
  const StretchPlace place(job.rounded, row);
  const bool fp8 = job.rounded.order == CodeOrder::kTilesFp8;
  batches([&](int stretch, const float(&x)[kCount][4]) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      const int col = (stretch + s) * 128 + lane * 4;
      uint8_t* codes = place.codes + int64_t{stretch + s} * place.step;
      if (job.expanded) store_expanded(job, row, col, by, x[s]);
      if (fp8) {
        store_codes<true>(by, x[s], (col & ~7) < cols, codes);
      } else {
        store_codes<false>(by, x[s], (col & ~7) < cols, codes);
      }
    }
  });
}

// Whether scales depend on the greatest magnitude of the whole row.
__device__ inline bool needs_largest(const RowsJob& job) {
  return job.level_group > 0 || !whole_stretches(job);
}

// A row of a block of threads. batches(f) calls f(stretch, x) with the calling warp's columns
// of kCount stretches from `stretch` on, until all have been seen; thread_largest: the greatest
// magnitude of the thread's, if needs_largest().
template <int kCount, typename Batches>
__device__ void round_block(const RowsJob& job, int64_t row, float thread_largest,
                            const Batches& batches) {
  const uint32_t largest = needs_largest(job) ? block_max(__float_as_uint(thread_largest)) : 0;
  const float unit = job.level_group > 0 ? store_unit(job, row, __uint_as_float(largest)) : 0.0f;
  if (!whole_stretches(job)) {
    round_one_group<kCount>(job, row, largest, unit, batches);
  } else {
    const StretchPlace place(job.rounded, row);
    batches([&](int stretch, const float(&x)[kCount][4]) {
      round_stretches(job, row, stretch, unit, place, x);
    });
  }
  round_padding(job, row);
}

// What a norm of a thread's columns needs and no kernel writes.
template <int kCount>
struct NormInput {
  float4 gains[kCount];
  double inverse_cols;  // 1 / columns of a row
  __device__ NormInput(const RowsJob& job, int col) : inverse_cols(1.0 / job.cols) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      gains[s] = make_float4(0, 0, 0, 0);
      if (job.gain && col + s * 128 < job.cols) {
        gains[s] = *reinterpret_cast<const float4*>(job.gain + col + s * 128);
      }
    }
  }
};

// Sum over a block of threads; every thread gets it. Once in a kernel.
__device__ inline double block_sum(double value) {
  __shared__ double sums[kWarp];
  const int lane = threadIdx.x % kWarp;
  value = warp_sum(value);
  if (lane == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_sum(lane < blockDim.x / kWarp ? sums[lane] : 0.0);
}

// x / rms(x) * gain.
template <int kCount>
__device__ void norm_columns(const RowsJob& job, const NormInput<kCount>& norm,
                             float (&x)[kCount][4]) {
  double squares = 0;
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      squares += static_cast<double>(x[s][i]) * static_cast<double>(x[s][i]);
    }
  }
  const float factor = norm_factor(block_sum(squares) * norm.inverse_cols, job.eps);
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    x[s][0] = x[s][0] * factor * norm.gains[s].x;
    x[s][1] = x[s][1] * factor * norm.gains[s].y;
    x[s][2] = x[s][2] * factor * norm.gains[s].z;
    x[s][3] = x[s][3] * factor * norm.gains[s].w;
  }
}

// The greatest magnitude of a thread's columns.
template <int kCount>
__device__ float largest_of(const float (&x)[kCount][4]) {
  float largest = 0;
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = max_or_nan(largest, fabsf(x[s][i]));
  }
  return largest;
}

}  // namespace tq::cuda
