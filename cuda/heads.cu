// heads - what happens to single heads between the projections and attention.
//
// heads - q, k <- H(rope(rms_norm(head)));  cache[pos] <- k, v   each part optional
// Shapes    q [rows, n_heads, head_dim], k, v [rows, n_kv_heads, head_dim] f32
// Work      a warp a head; the head stays in shared memory between the parts
// Memory    every head read and written once -> DRAM in prefill, latency in decode
// Requires  head_dim even, at most 1024
// Error     the CPU's operations in the CPU's order, sums of squares in double: bit for bit, codes
//           of the cache too; tests/test_cuda_ops.cpp
// Source    docs/format.md, "KV cache"
#include "cuda/device.cuh"
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
  const float top = static_cast<float>((1 << cache.bits) - 1);
  const __half minimum_half = __float2half_rn(low);
  const float minimum = __half2float(minimum_half);
  // The minimum may have been rounded up past all of x.
  const __half scale_half = __float2half_rn(fmaxf(high - minimum, 0.0f) / top);
  const float scale = __half2float(scale_half);
  const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  if (lane == 0) {
    // What is not finite must be seen in the output, not rounded away.
    *by = finite ? __halves2half2(scale_half, minimum_half)
                 : __halves2half2(__ushort_as_half(0), __ushort_as_half(0x7E00));
  }
  const auto code = [&](int64_t i) {
    if (!finite || i >= cache.head_dim) return 0;
    const float scaled = (x[i] - minimum) * inverse;
    const float bounded = scaled > 0 ? fminf(scaled, top) : 0.0f;
    return static_cast<int>((bounded + kRoundMagic) - kRoundMagic);
  };
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
    const float factor = static_cast<float>(1.0 / sqrt(mean + static_cast<double>(job.eps)));
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

}  // namespace

void launch_heads(const HeadsJob& job, const Gpu& gpu) {
  TQ_CHECK(job.head_dim % 2 == 0 && job.head_dim <= 1024);
  TQ_CHECK(!job.store || (job.k && job.v));
  const int64_t per_row =
      (job.q ? job.n_heads : 0) + (job.k ? job.n_kv_heads : 0) + (job.store ? job.n_kv_heads : 0);
  const int64_t blocks = (job.rows * per_row + kHeads - 1) / kHeads;
  if (blocks == 0) return;
  launch_kernel(gpu, "heads", heads_kernel, dim3(static_cast<unsigned>(blocks)),
                dim3(kHeads * kWarp), kHeads * 2 * job.head_dim * 4, job);
}

}  // namespace tq::cuda
