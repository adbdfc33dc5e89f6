// heads - what happens to single heads between the projections and attention.
//
// heads - q, k <- H(rope(rms_norm(head)));  cache[pos] <- k, v   each part optional
// Shapes    q [rows, n_heads, head_dim], k, v [rows, n_kv_heads, head_dim] f32
// Work      many rows, heads of 64, 128 and 256: they stay in registers, 8 columns a lane: the two
//           times 4 that a rotation pairs; 4 heads a lane, so that the reads of all are
//           under way at once and each lane computes the norm's factor of one. Others: a warp a
//           head, in shared memory
// Memory    every head read and written once -> DRAM in prefill, latency in decode
// Requires  head_dim even, at most 1024
// Error     the CPU's operations in the CPU's order, sums of squares in double: bit for bit, codes
//           of the cache too; tests/test_cuda_ops.cpp
// Source    docs/format.md, "KV cache"
// Measured  H100 (3.03 TB/s), 2048 rows of Qwen3-8B, 16-bit cache, 2026-11-27, bench_cuda rows:
//           39 us, 85 % of the bandwidth
#include "cuda/hadamard.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kHeads = 4;  // warps of a block

// In shared memory, by one warp: v <- v H / sqrt(block), block by block.
__device__ void hadamard_head(const HeadsJob& job, float* v, float* scratch) {
  const int lane = threadIdx.x % kWarp;
  const int64_t inner = job.block / job.base_order;
  for (int64_t half = 1; half < inner; half *= 2) {
    for (int64_t item = lane; item < job.head_dim / 2; item += kWarp) {
      const int64_t i = item / half * 2 * half + item % half;
      const float a = v[i], b = v[i + half];
      v[i] = a + b;
      v[i + half] = a - b;
    }
    __syncwarp();
  }
  for (int64_t i = lane; i < job.head_dim; i += kWarp) {
    const int64_t first = i / job.block * job.block, at = i - first;
    float sum = v[first + at % inner];
    if (job.base_order > 1) {
      const int8_t* signs = job.base + at / inner;
      sum = signs[0] < 0 ? -sum : sum;
      for (int64_t from = 1; from < job.base_order; ++from) {
        const float term = v[first + from * inner + at % inner];
        sum += signs[from * job.base_order] < 0 ? -term : term;
      }
    } else {
      sum = v[i];
    }
    scratch[i] = sum * job.hadamard_scale;
  }
  __syncwarp();
  for (int64_t i = lane; i < job.head_dim; i += kWarp) v[i] = scratch[i];
  __syncwarp();
}

// The numbers of a vector that the cache holds in codes.
struct CacheScale {
  __half scale_half, minimum_half;
  float minimum, inverse, top;
  __device__ CacheScale(int bits, float low, float high) {
    top = static_cast<float>((1 << bits) - 1);
    minimum_half = __float2half_rn(low);
    minimum = __half2float(minimum_half);
    // The minimum may have been rounded up past all of x.
    scale_half = __float2half_rn(fmaxf(high - minimum, 0.0f) / top);
    const float scale = __half2float(scale_half);
    inverse = scale > 0 ? 1.0f / scale : 0.0f;
  }
  // What is not finite must be seen in the output, not rounded away.
  __device__ __half2 stored(bool finite) const {
    return finite ? __halves2half2(scale_half, minimum_half)
                  : __halves2half2(__ushort_as_half(0), __ushort_as_half(0x7E00));
  }
  __device__ uint32_t code(float x) const {
    const float scaled = (x - minimum) * inverse;
    const float bounded = scaled > 0 ? fminf(scaled, top) : 0.0f;
    return static_cast<uint32_t>((bounded + kRoundMagic) - kRoundMagic);
  }
};

// One vector into the cache, by one warp.
__device__ void store_vector(const CacheView& cache, const float* x, uint8_t* to, __half2* by) {
  const int lane = threadIdx.x % kWarp;
  if (cache.bits == 32) {
    for (int64_t i = lane; i < cache.head_dim; i += kWarp) reinterpret_cast<float*>(to)[i] = x[i];
    return;
  }
  if (cache.bits == 16) {
    for (int64_t i = lane; i < cache.head_dim; i += kWarp) {
      reinterpret_cast<__half*>(to)[i] = __float2half_rn(x[i]);
    }
    return;
  }
  float low = x[0], high = x[0];
  bool finite = true;
  for (int64_t i = lane; i < cache.head_dim; i += kWarp) {
    finite = finite && isfinite(x[i]);
    low = fminf(low, x[i]);
    high = fmaxf(high, x[i]);
  }
  finite = __all_sync(kFullMask, finite);
  high = warp_max(high);
  low = -warp_max(-low);
  const CacheScale scale(cache.bits, low, high);
  if (lane == 0) *by = scale.stored(finite);
  const auto code = [&](int64_t i) { return finite && i < cache.head_dim ? scale.code(x[i]) : 0u; };
  for (int64_t i = lane; i < cache.vector_bytes; i += kWarp) {
    to[i] = static_cast<uint8_t>(cache.bits == 8 ? code(i) : code(2 * i) | code(2 * i + 1) << 4);
  }
}

__global__ void heads_kernel(const __grid_constant__ HeadsJob job) {
  begin_kernel();
  extern __shared__ float shared[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t n_q = job.q ? job.n_heads : 0, n_k = job.k ? job.n_kv_heads : 0;
  const int64_t per_row = n_q + n_k + (job.store ? job.n_kv_heads : 0);
  const int64_t item = blockIdx.x * int64_t{kHeads} + warp;
  if (item >= job.rows * per_row) return;
  const int64_t row = item / per_row, at = item % per_row;
  const int64_t pos = job.input->pos0 + row;
  const bool is_q = at < n_q, is_k = !is_q && at < n_q + n_k;
  const int64_t head = is_q ? at : is_k ? at - n_q : at - n_q - n_k;
  float* v = shared + warp * 2 * job.head_dim;
  const float* from = is_q   ? job.q + (row * job.n_heads + head) * job.head_dim
                      : is_k ? job.k + (row * job.n_kv_heads + head) * job.head_dim
                             : job.v + (row * job.n_kv_heads + head) * job.head_dim;
  for (int64_t i = lane; i < job.head_dim; i += kWarp) v[i] = from[i];
  __syncwarp();
  const float* gain = is_q ? job.q_gain : is_k ? job.k_gain : nullptr;
  if (gain) {
    double squares = 0;
    for (int64_t i = lane; i < job.head_dim; i += kWarp) {
      squares += static_cast<double>(v[i]) * static_cast<double>(v[i]);
    }
    const double mean = warp_sum(squares) / static_cast<double>(job.head_dim);
    const float factor = norm_factor(mean, job.eps);
    for (int64_t i = lane; i < job.head_dim; i += kWarp) v[i] = v[i] * factor * gain[i];
    __syncwarp();
  }
  if (is_q || is_k) {
    if (job.angles) {
      const int64_t half = job.head_dim / 2;
      for (int64_t i = lane; i < half; i += kWarp) {
        const float2 turn = job.angles[pos * half + i];
        const float a = v[i], b = v[i + half];
        v[i] = a * turn.x - b * turn.y;
        v[i + half] = b * turn.x + a * turn.y;
      }
      __syncwarp();
    }
    if (job.block > 0) hadamard_head(job, v, v + job.head_dim);
    float* to = const_cast<float*>(from);
    if (gain || job.angles || job.block > 0) {
      for (int64_t i = lane; i < job.head_dim; i += kWarp) to[i] = v[i];
    }
  }
  if (is_q || !job.store) return;
  const int64_t place = head * job.cache.ctx + pos;
  store_vector(job.cache, v,
               (is_k ? job.cache.keys : job.cache.values) + place * job.cache.vector_bytes,
               (is_k ? job.cache.key_scales : job.cache.value_scales) + place);
}

constexpr int kThreads = 256, kHeadsOfLane = 4;

// 8 columns of a head that kLanes lanes hold: 4 from `lane` * 4 on of the first half, then 4 of the
// second.
struct Columns {
  float x[2][4];
};

template <int kLanes, typename T, typename Combine>
__device__ T reduce_lanes(T value, const Combine& combine) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(kFullMask, value, step));
  }
  return value;
}

template <int kLanes>
__device__ void load_head(const float* from, int lane, Columns& head) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 v = *reinterpret_cast<const float4*>(from + (half * kLanes + lane) * 4);
    head.x[half][0] = v.x, head.x[half][1] = v.y, head.x[half][2] = v.z, head.x[half][3] = v.w;
  }
}

// The whole head is one block of butterflies.
template <int kLanes>
__device__ void hadamard_columns(float scale, int lane, Columns& head) {
#pragma unroll
  for (int half = 0; half < 2; ++half) butterfly_stages(head.x[half]);
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& x = head.x[i / 4][i % 4];
      const float other = __shfl_xor_sync(kFullMask, x, step);
      x = lane & step ? other - x : x + other;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float a = head.x[0][i], b = head.x[1][i];
    head.x[0][i] = (a + b) * scale;
    head.x[1][i] = (a - b) * scale;
  }
}

// One vector into the cache, as store_vector() does it. `stored` false: the lanes of another head
// of the warp are at work.
template <int kLanes>
__device__ void store_columns(const CacheView& cache, const Columns& head, int lane, bool stored,
                              uint8_t* to, __half2* by) {
  if (cache.bits >= 16) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int col = (half * kLanes + lane) * 4;
      const float(&x)[4] = head.x[half];
      if (!stored) continue;
      if (cache.bits == 32) {
        *reinterpret_cast<float4*>(to + col * 4) = make_float4(x[0], x[1], x[2], x[3]);
      } else {
        __half2 pairs[2] = {__floats2half2_rn(x[0], x[1]), __floats2half2_rn(x[2], x[3])};
        *reinterpret_cast<uint2*>(to + col * 2) = *reinterpret_cast<uint2*>(pairs);
      }
    }
    return;
  }
  float low = head.x[0][0], high = low;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float x = head.x[i / 4][i % 4];
    finite = finite && isfinite(x);
    low = fminf(low, x);
    high = fmaxf(high, x);
  }
  finite = reduce_lanes<kLanes>(finite ? 1 : 0, [](int a, int b) { return a & b; }) != 0;
  low = reduce_lanes<kLanes>(low, [](float a, float b) { return fminf(a, b); });
  high = reduce_lanes<kLanes>(high, [](float a, float b) { return fmaxf(a, b); });
  if (!stored) return;
  const CacheScale scale(cache.bits, low, high);
  if (lane == 0) *by = scale.stored(finite);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int col = (half * kLanes + lane) * 4;
    uint32_t codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i] = finite ? scale.code(head.x[half][i]) : 0;
    if (cache.bits == 8) {
      *reinterpret_cast<uint32_t*>(to + col) =
          codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24;
    } else {
      *reinterpret_cast<uint16_t*>(to + col / 2) =
          static_cast<uint16_t>(codes[0] | codes[1] << 4 | codes[2] << 8 | codes[3] << 12);
    }
  }
}

template <int kLanes>
__global__ void __launch_bounds__(kThreads) columns_kernel(const __grid_constant__ HeadsJob job) {
  constexpr int kDim = 8 * kLanes, kSlots = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes, slot = threadIdx.x / kLanes;
  const uint32_t n_q = job.q ? job.n_heads : 0, n_k = job.k ? job.n_kv_heads : 0;
  const uint32_t per_row = n_q + n_k + (job.store ? job.n_kv_heads : 0);
  const uint32_t n_items = static_cast<uint32_t>(job.rows) * per_row;
  begin_kernel();
  struct Place {
    uint32_t row, at;
    bool inside, is_q, is_k;
  };
  const auto place_of = [&](int h) {
    const uint32_t item = (blockIdx.x * kHeadsOfLane + h) * kSlots + slot;
    Place place;
    place.inside = item < n_items;
    place.row = place.inside ? item / per_row : 0;
    place.at = place.inside ? item % per_row : 0;
    place.is_q = place.at < n_q;
    place.is_k = !place.is_q && place.at < n_q + n_k;
    return place;
  };
  const auto head_of = [&](const Place& p) {
    return p.is_q ? p.at : p.is_k ? p.at - n_q : p.at - n_q - n_k;
  };
  const auto vector_of = [&](const Place& p) {
    const float* from = p.is_q ? job.q : p.is_k ? job.k : job.v;
    const uint32_t n_heads = p.is_q ? job.n_heads : job.n_kv_heads;
    return from + (int64_t{p.row} * n_heads + head_of(p)) * kDim;
  };
  Columns heads[kHeadsOfLane];
#pragma unroll
  for (int h = 0; h < kHeadsOfLane; ++h) load_head<kLanes>(vector_of(place_of(h)), lane, heads[h]);
  float my_factor = 0;
  if (job.q_gain || job.k_gain) {
    double my_squares = 0;
#pragma unroll
    for (int h = 0; h < kHeadsOfLane; ++h) {
      double squares = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const double x = heads[h].x[i / 4][i % 4];
        squares += x * x;
      }
      squares = reduce_lanes<kLanes>(squares, [](double a, double b) { return a + b; });
      if (lane % kHeadsOfLane == h) my_squares = squares;
    }
    const double mean = my_squares / kDim;
    my_factor = norm_factor(mean, job.eps);
  }
#pragma unroll
  for (int h = 0; h < kHeadsOfLane; ++h) {
    const Place place = place_of(h);
    const float factor = __shfl_sync(kFullMask, my_factor, h, kLanes);
    const bool turns = place.is_q || place.is_k;
    const float* gain = place.is_q ? job.q_gain : place.is_k ? job.k_gain : nullptr;
    const int64_t pos = job.input->pos0 + int64_t{place.row};
    Columns& head = heads[h];
    if (gain) {
      Columns gains;
      load_head<kLanes>(gain, lane, gains);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        head.x[i / 4][i % 4] = head.x[i / 4][i % 4] * factor * gains.x[i / 4][i % 4];
      }
    }
    if (turns && job.angles) {
      const float2* angles = job.angles + pos * (kDim / 2) + lane * 4;
      float2 turn[4];
      *reinterpret_cast<float4*>(turn) = *reinterpret_cast<const float4*>(angles);
      *reinterpret_cast<float4*>(turn + 2) = *reinterpret_cast<const float4*>(angles + 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float a = head.x[0][i], b = head.x[1][i];
        head.x[0][i] = a * turn[i].x - b * turn[i].y;
        head.x[1][i] = b * turn[i].x + a * turn[i].y;
      }
    }
    if (job.block > 0) {
      Columns rotated = head;
      hadamard_columns<kLanes>(job.hadamard_scale, lane, rotated);
      if (turns) head = rotated;
    }
    if (turns && place.inside && (gain || job.angles || job.block > 0)) {
      float* to = const_cast<float*>(vector_of(place));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float(&x)[4] = head.x[half];
        *reinterpret_cast<float4*>(to + (half * kLanes + lane) * 4) =
            make_float4(x[0], x[1], x[2], x[3]);
      }
    }
    if (!job.store) continue;
    const int64_t at = head_of(place) * job.cache.ctx + pos;
    store_columns<kLanes>(
        job.cache, head, lane, place.inside && !place.is_q,
        (place.is_k ? job.cache.keys : job.cache.values) + at * job.cache.vector_bytes,
        (place.is_k ? job.cache.key_scales : job.cache.value_scales) + at);
  }
}

}  // namespace

void launch_heads(const HeadsJob& job, const Gpu& gpu) {
  TQ_CHECK(job.head_dim % 2 == 0 && job.head_dim <= 1024);
  TQ_CHECK(!job.store || (job.k && job.v));
  const int64_t per_row =
      (job.q ? job.n_heads : 0) + (job.k ? job.n_kv_heads : 0) + (job.store ? job.n_kv_heads : 0);
  const int64_t n_items = job.rows * per_row;
  if (n_items == 0) return;
  const bool whole = job.block == 0 || (job.block == job.head_dim && job.base_order == 1);
  const int64_t lanes = job.head_dim / 8;
  if (job.rows > kMatvecRows && whole &&
      (job.head_dim == 64 || job.head_dim == 128 || job.head_dim == 256)) {
    const auto kernel = lanes == 8    ? columns_kernel<8>
                        : lanes == 16 ? columns_kernel<16>
                                      : columns_kernel<32>;
    const int64_t of_block = kThreads / lanes * kHeadsOfLane;
    launch_kernel(gpu, "heads", kernel,
                  dim3(static_cast<unsigned>((n_items + of_block - 1) / of_block)), dim3(kThreads),
                  0, job);
    return;
  }
  const int64_t blocks = (n_items + kHeads - 1) / kHeads;
  launch_kernel(gpu, "heads", heads_kernel, dim3(static_cast<unsigned>(blocks)),
                dim3(kHeads * kWarp), kHeads * 2 * job.head_dim * 4, job);
}

}  // namespace tq::cuda
