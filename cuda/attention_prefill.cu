// attention_prefill - causal attention of many rows on the tensor cores, online softmax: caches of
// 32 bits, and all where there is no wgmma (attention_wgmma.cu).
//
// attention - out = sum_j softmax_j(scale q.k_j) v_j over the keys j <= position of the row
// Shapes    q, out [rows, n_heads, head_dim] f32; keys, values [kv head, ctx, head_dim] in 32, 16,
//           8 or 4 bits, read as f16, those of 32 bits as two f16 parts
// Work      a block: 128 queries (all query heads of a key head, row by row) x all keys, 64 at a
//           time (32 of 32 bits); a warp 16 queries. Scores and sums stay in registers; q too, as
//           f16. 32 bits: q and the weights have two parts as well, and every product takes three
// Memory    64 keys and values: 32 KB in shared memory, two of them, for 128 queries: bound by mma
//           m16n8k16 (f16 in, f32 sums) and by exp. 16-bit caches come by cp.async one tile ahead
// Constants 128 queries: each key tile is read by 8 warps. head_dim is padded to 64 or 128
// Requires  head_dim a multiple of 8, at most 128; keys and values below 65504, of 32 bits too
//           (beyond, the result is NaN)
// Error     q, the weights and values of 8- and 4-bit caches are rounded to f16: scores move by
//           2^-11 |q||k| scale, the sum by 2^-11 max|v|. 32 bits: 2^-20 in place of 2^-11, and
//           keys and values are off by up to 2^-25; tests/test_cuda_ops.cpp
// Source    FlashAttention-2 (Dao 2023)
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/mma.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kThreads = 256, kQueries = 128;
template <int kBits>
constexpr int kParts = kBits == 32 ? 2 : 1;  // f16 parts of a number
template <int kBits>
constexpr int kKeys = 64 / kParts<kBits>;  // of a tile

// Place of 16-byte word `word` of vector `key`: eight neighbouring keys meet no bank twice.
template <int kDim>
__device__ inline int place(int key, int word) {
  return key * (kDim / 8) + (word ^ (key & 7));
}

// kKeys keys from `first` on or their values into shared memory, the low parts behind the high
// ones; zeros behind n_keys and head_dim.
template <int kDim, int kBits>
__device__ void load_tile(const CacheView& cache, const uint8_t* vectors, const __half2* scales,
                          int64_t first, int64_t n_keys, uint4* tile) {
  constexpr int kWords = kDim / 8, kPart = kKeys<kBits> * kWords;
  for (int i = threadIdx.x; i < kPart; i += kThreads) {
    const int key = i / kWords, word = i % kWords;
    uint4* to = tile + place<kDim>(key, word);
    if (first + key >= n_keys || word * 8 >= cache.head_dim) {
      for (int part = 0; part < kParts<kBits>; ++part) to[part * kPart] = make_uint4(0, 0, 0, 0);
      continue;
    }
    const uint8_t* from = vectors + (first + key) * cache.vector_bytes + word * kBits;
    if constexpr (kBits == 32) {
      const float4 x[2] = {reinterpret_cast<const float4*>(from)[0],
                           reinterpret_cast<const float4*>(from)[1]};
      uint4 high, low;
      split_half(x[0].x, x[0].y, high.x, low.x);
      split_half(x[0].z, x[0].w, high.y, low.y);
      split_half(x[1].x, x[1].y, high.z, low.z);
      split_half(x[1].z, x[1].w, high.w, low.w);
      to[0] = high;
      to[kPart] = low;
    } else if constexpr (kBits == 16) {
      copy_async(to, from);
    } else {
      const float2 by = __half22float2(scales[first + key]);
      float x[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        uint32_t code;
        if constexpr (kBits == 8) {
          code = reinterpret_cast<const uint32_t*>(from)[j / 4] >> j % 4 * 8 & 255;
        } else {
          code = *reinterpret_cast<const uint32_t*>(from) >> 4 * j & 15;
        }
        x[j] = fmaf(static_cast<float>(code), by.x, by.y);
      }
      *to = make_uint4(pack_half(x[0], x[1]), pack_half(x[2], x[3]), pack_half(x[4], x[5]),
                       pack_half(x[6], x[7]));
    }
  }
}

// Two floats as word i of the parts of an operand.
template <int kBits>
__device__ inline void store_parts(float first, float second, int i,
                                   uint32_t (&parts)[kParts<kBits>][4]) {
  if constexpr (kBits == 32) {
    split_half(first, second, parts[0][i], parts[1][i]);
  } else {
    parts[0][i] = pack_half(first, second);
  }
}

// acc[0, 2) += A B for two neighbouring tiles of 8 columns, all parts but low by low.
template <int kBits>
__device__ inline void multiply(float (*acc)[4], const uint32_t (&a)[kParts<kBits>][4],
                                const uint32_t (&b)[kParts<kBits>][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int a_part = kParts<kBits> - 1; a_part >= 0; --a_part) {
#pragma unroll
      for (int b_part = kParts<kBits> - 1 - a_part; b_part >= 0; --b_part) {
        mma_f16(acc[i], a[a_part], b[b_part][2 * i], b[b_part][2 * i + 1]);
      }
    }
  }
}

template <int kDim, int kBits>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const __grid_constant__ AttentionJob job) {
  begin_kernel();
  extern __shared__ uint4 shared[];
  constexpr int kTileKeys = kKeys<kBits>, kPart = kTileKeys * kDim / 8;  // in words
  constexpr int kTile = kParts<kBits> * kPart;
  const CacheView& cache = job.cache;
  const int64_t group = job.n_heads / cache.n_kv_heads, kv_head = blockIdx.y;
  const int64_t n_queries = job.rows * group;
  // The last queries have the most keys: they go first.
  const int64_t first_query = (gridDim.x - 1 - blockIdx.x) * int64_t{kQueries};
  const int64_t pos0 = job.input->pos0;
  const int64_t last_row = (min(first_query + kQueries, n_queries) - 1) / group;
  const int64_t n_keys = pos0 + last_row + 1;
  const int n_tiles = static_cast<int>((n_keys + kTileKeys - 1) / kTileKeys);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, t = lane % 4;

  // Rows l/4 and l/4 + 8 of the warp's 16 queries.
  int64_t limit[2];  // keys that the query sees
  const float* from[2];
  float* to[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t query = first_query + warp * 16 + g + 8 * i;
    const int64_t known = min(query, n_queries - 1);
    const int64_t at =
        (known / group * job.n_heads + kv_head * group + known % group) * cache.head_dim;
    limit[i] = pos0 + known / group + 1;
    from[i] = job.q + at;
    to[i] = query < n_queries ? job.out + at : nullptr;
  }
  uint32_t q[kDim / 16][kParts<kBits>][4];
  const float factor = job.scale * kLog2E;  // exp(x) = 2^(x log2 e)
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int col = k * 16 + i / 2 * 8 + 2 * t;
      const bool inside = col < cache.head_dim;
      const float* x = from[i % 2] + col;
      const float2 pair = inside ? make_float2(x[0] * factor, x[1] * factor) : make_float2(0, 0);
      store_parts<kBits>(pair.x, pair.y, i, q[k]);
    }
  }
  const uint8_t* keys = cache.keys + kv_head * cache.ctx * cache.vector_bytes;
  const uint8_t* values = cache.values + kv_head * cache.ctx * cache.vector_bytes;
  const __half2* key_scales = kBits < 16 ? cache.key_scales + kv_head * cache.ctx : nullptr;
  const __half2* value_scales = kBits < 16 ? cache.value_scales + kv_head * cache.ctx : nullptr;
  const auto load = [&](int tile) {
    if (tile < n_tiles) {
      uint4* stage = shared + tile % 2 * 2 * kTile;
      const int64_t first = int64_t{tile} * kTileKeys;
      load_tile<kDim, kBits>(cache, keys, key_scales, first, n_keys, stage);
      load_tile<kDim, kBits>(cache, values, value_scales, first, n_keys, stage + kTile);
    }
    commit();
  };

  float out[kDim / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  load(0);
  for (int tile = 0; tile < n_tiles; ++tile) {
    wait_for<0>();
    __syncthreads();
    load(tile + 1);
    const uint4* key_tile = shared + tile % 2 * 2 * kTile;
    const uint4* value_tile = key_tile + kTile;
    const int64_t first = int64_t{tile} * kTileKeys;
    float scores[kTileKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int pair = 0; pair < kTileKeys / 16; ++pair) {
        // Matrices: keys 0-7 and 8-15, each with coordinates 0-7 and 8-15.
        uint32_t b[kParts<kBits>][4];
        const int key = pair * 16 + lane / 16 * 8 + lane % 8, word = 2 * k + lane / 8 % 2;
#pragma unroll
        for (int part = 0; part < kParts<kBits>; ++part) {
          load_matrices<false>(b[part], key_tile + part * kPart + place<kDim>(key, word));
        }
        multiply<kBits>(scores + 2 * pair, q[k], b);
      }
    }
    if (first + kTileKeys > min(limit[0], limit[1])) {
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (first + j * 8 + 2 * t + i % 2 >= limit[i / 2]) scores[j][i] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = max[i];
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) {
        top = fmaxf(top, fmaxf(scores[j][2 * i], scores[j][2 * i + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
      const float base = top == -INFINITY ? 0.0f : top;  // nothing to see yet
      const auto weight = [&](float score) {
        return exp2f(kBits == 32 ? score - base + kWeightShift : score - base);
      };
      const float keep = exp2f(max[i] - base);
      max[i] = top;
      float part = 0;
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) {
        scores[j][2 * i] = weight(scores[j][2 * i]);
        scores[j][2 * i + 1] = weight(scores[j][2 * i + 1]);
        part += scores[j][2 * i] + scores[j][2 * i + 1];
      }
      sum[i] = sum[i] * keep + part;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        out[n][2 * i] *= keep;
        out[n][2 * i + 1] *= keep;
      }
    }
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k) {
      uint32_t a[kParts<kBits>][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* weights = scores[2 * k + i / 2] + i % 2 * 2;
        store_parts<kBits>(weights[0], weights[1], i, a);
      }
#pragma unroll
      for (int pair = 0; pair < kDim / 16; ++pair) {
        // Matrices, transposed: keys 0-7 and 8-15 of coordinates 0-7, then of 8-15.
        uint32_t b[kParts<kBits>][4];
        const int key = k * 16 + lane / 8 % 2 * 8 + lane % 8, word = 2 * pair + lane / 16;
#pragma unroll
        for (int part = 0; part < kParts<kBits>; ++part) {
          load_matrices<true>(b[part], value_tile + part * kPart + place<kDim>(key, word));
        }
        multiply<kBits>(out + 2 * pair, a, b);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += __shfl_xor_sync(kFullMask, sum[i], 1);
    sum[i] += __shfl_xor_sync(kFullMask, sum[i], 2);
    if (!to[i]) continue;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int col = n * 8 + 2 * t;
      if (col >= cache.head_dim) continue;
      *reinterpret_cast<float2*>(to[i] + col) =
          make_float2(out[n][2 * i] / sum[i], out[n][2 * i + 1] / sum[i]);
    }
  }
}

template <int kDim>
void launch_dim(const AttentionJob& job, const Gpu& gpu) {
  const int64_t queries = job.rows * (job.n_heads / job.cache.n_kv_heads);
  const dim3 grid(static_cast<unsigned>((queries + kQueries - 1) / kQueries),
                  static_cast<unsigned>(job.cache.n_kv_heads));
  const auto kernel = job.cache.bits == 32   ? prefill_kernel<kDim, 32>
                      : job.cache.bits == 16 ? prefill_kernel<kDim, 16>
                      : job.cache.bits == 8  ? prefill_kernel<kDim, 8>
                                             : prefill_kernel<kDim, 4>;
  launch_kernel(gpu, "attention prefill", kernel, grid, dim3(kThreads), 4 * 64 * kDim * 2, job);
}

}  // namespace

bool attention_prefill_takes(const CacheView& cache, int64_t rows) {
  return rows > kMatvecRows && cache.head_dim % 8 == 0 && cache.head_dim <= 128;
}

void launch_attention_prefill(const AttentionJob& job, const Gpu& gpu) {
  TQ_CHECK(attention_prefill_takes(job.cache, job.rows));
  if (attention_wgmma_takes(job.cache, gpu)) return launch_attention_wgmma(job, gpu);
  job.cache.head_dim <= 64 ? launch_dim<64>(job, gpu) : launch_dim<128>(job, gpu);
}

}  // namespace tq::cuda
