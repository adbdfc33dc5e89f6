// attention_decode - attention of few rows over a long cache: every cached byte is read once. The
// usual case has a kernel of its own, attention_f16.cu.
//
// attention - out = sum_j softmax_j(scale q.k_j) v_j over the keys j <= position of the row
// Shapes    q, out [rows, n_heads, head_dim] f32; keys, values [kv head, ctx, head_dim] in 32, 16,
//           8 or 4 bits
// Work      a block: one row, one key head (queries that share it, up to 4), one stretch of
//           keys. A lane owns 8 coordinates; ceil(head_dim / 8) lanes (up to a power of two) a key
//           slot; each slot keeps an online softmax of its own over every n-th key. Slots and warps
//           are merged through shared memory, stretches by the block that ends last.
// Memory    the cache of the row's positions once -> DRAM; 4 keys a slot in flight
// Constants 4 keys a step: one rescaling of the sums for four keys, 8 loads in flight a lane
// Requires  head_dim <= 256
// Error     scores gamma_head_dim |q||k| as on the CPU, exp 2 ulp; sums in another order;
//           tests/test_cuda_ops.cpp
// Source    online softmax (Milakov and Gimelshein 2018), flash-decoding (Dao et al. 2023)
#include <algorithm>
#include <bit>

#include "cuda/attention_merge.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kKeys = 4;             // of a slot a step
constexpr int64_t kMinStretch = 32;  // keys of a block
constexpr int64_t kClusterKeys = 4096;

// Coordinates [8 chunk, 8 chunk + 8) of a cached vector as they are stored: asked for long before
// they are needed, and as small as possible until then.
template <int kBits>
struct Chunk {
  static constexpr int kWords = kBits / 4;
  uint32_t words[kWords];
  __half2 by;  // scale and minimum

  __device__ void load(const CacheView& cache, const uint8_t* vectors, const __half2* scales,
                       int64_t at, int chunk) {
    const uint8_t* from = vectors + at * cache.vector_bytes + chunk * kBits;
    if constexpr (kBits < 16) by = scales[at];
    if (cache.head_dim % 8 != 0 || chunk * 8 >= cache.head_dim) {  // odd vectors begin anywhere
      const int64_t n_bytes = cache.vector_bytes - chunk * kBits;
      for (int i = 0; i < kWords; ++i) {
        words[i] = 0;
        for (int j = 0; j < 4; ++j) {
          if (4 * i + j < n_bytes) words[i] |= uint32_t{from[4 * i + j]} << 8 * j;
        }
      }
    } else if constexpr (kBits == 4) {
      words[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (kBits == 8) {
      *reinterpret_cast<uint2*>(words) = *reinterpret_cast<const uint2*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        *reinterpret_cast<uint4*>(words + i) = *reinterpret_cast<const uint4*>(from + 4 * i);
      }
    }
  }
  __device__ void expand(float* out) const {
    if constexpr (kBits == 32) {
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = __uint_as_float(words[i]);
    } else if constexpr (kBits == 16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
      }
    } else {
      const float2 scale = __half22float2(by);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t code =
            kBits == 8 ? words[i * kBits / 32] >> i % 4 * 8 & 255 : words[0] >> 4 * i & 15;
        out[i] = fmaf(small_float(code), scale.x, scale.y);
      }
    }
  }
};

// (max, sum, out) of one query and 8 coordinates, merged with another stretch's.
struct Part {
  float max, sum, out[8];
  __device__ void merge(const Part& other) {
    const float top = fmaxf(max, other.max);
    // Both empty: -inf - -inf would be NaN.
    const float keep = max == -INFINITY ? 0.0f : exp2f(max - top);
    const float take = other.max == -INFINITY ? 0.0f : exp2f(other.max - top);
    max = top;
    sum = fmaf(other.sum, take, sum * keep);
    for (int i = 0; i < 8; ++i) out[i] = fmaf(other.out[i], take, out[i] * keep);
  }
};

template <int kBits, int kQueries>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(const __grid_constant__ AttentionJob job, int lanes) {
  begin_kernel();
  const CacheView& cache = job.cache;
  const int n_heads = static_cast<int>(job.n_heads), n_splits = static_cast<int>(job.n_splits);
  const int group_size = n_heads / static_cast<int>(cache.n_kv_heads);
  const int query_blocks = (group_size + kQueries - 1) / kQueries;
  const int kv_head = static_cast<int>(blockIdx.y) / query_blocks;
  const int first_query = (static_cast<int>(blockIdx.y) - kv_head * query_blocks) * kQueries;
  const int n_queries = min(kQueries, group_size - first_query);
  const int split = blockIdx.x, row = blockIdx.z;
  const int n_keys = job.input->pos0 + row + 1;
  const int stretch = (n_keys + n_splits - 1) / n_splits;
  const int begin = split * stretch, end = min(begin + stretch, n_keys);

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int chunk = lane % lanes, slots = kWarp / lanes;
  const int slot = warp * slots + lane / lanes, n_slots = kWarps * slots;
  const int64_t first_head = kv_head * group_size + first_query;
  const float* q_row = job.q + (int64_t{row} * n_heads + first_head) * cache.head_dim;

  const float factor = job.scale * kLog2E;  // exp(x) = 2^(x log2 e)
  float q[kQueries][8];
  Part parts[kQueries];
  for (int i = 0; i < kQueries; ++i) {
    parts[i].max = -INFINITY;
    parts[i].sum = 0;
    for (int j = 0; j < 8; ++j) {
      const int64_t at = chunk * 8 + j;
      parts[i].out[j] = 0;
      q[i][j] =
          i < n_queries && at < cache.head_dim ? q_row[i * cache.head_dim + at] * factor : 0.0f;
    }
  }
  const int64_t base = kv_head * cache.ctx;
  Chunk<kBits> keys[kKeys], values[kKeys];
  const auto load = [&](Chunk<kBits>(&to)[kKeys], const uint8_t* vectors, const __half2* scales,
                        int first) {
#pragma unroll
    for (int step = 0; step < kKeys; ++step) {
      to[step].load(cache, vectors, scales, base + min(first + step * n_slots + slot, end - 1),
                    chunk);
    }
  };
  if (begin < end) load(keys, cache.keys, cache.key_scales, begin);
  for (int key = begin; key < end; key += n_slots * kKeys) {  // the same for all: shuffles
    load(values, cache.values, cache.value_scales, key);
    float scores[kKeys][kQueries];
#pragma unroll
    for (int step = 0; step < kKeys; ++step) {
      float k[8];
      keys[step].expand(k);
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        float score = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) score = fmaf(q[i][j], k[j], score);
        scores[step][i] = score;
      }
    }
    // The next keys are on their way while these ones' values are added.
    if (key + n_slots * kKeys < end) {
      load(keys, cache.keys, cache.key_scales, key + n_slots * kKeys);
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int step = 0; step < kKeys; ++step) {
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
          scores[step][i] += __shfl_xor_sync(kFullMask, scores[step][i], distance);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      float top = parts[i].max;
#pragma unroll
      for (int step = 0; step < kKeys; ++step) {
        if (key + step * n_slots + slot >= end) scores[step][i] = -INFINITY;
        top = fmaxf(top, scores[step][i]);  // passes NaN by; the weights keep it
      }
      const float above = top == -INFINITY ? 0.0f : top;  // nothing for this slot yet
      const float keep = exp2f(parts[i].max - above);
      parts[i].max = top;
      parts[i].sum *= keep;
#pragma unroll
      for (int j = 0; j < 8; ++j) parts[i].out[j] *= keep;
#pragma unroll
      for (int step = 0; step < kKeys; ++step) {
        scores[step][i] = exp2f(scores[step][i] - above);
        parts[i].sum += scores[step][i];
      }
    }
#pragma unroll
    for (int step = 0; step < kKeys; ++step) {
      float v[8];
      values[step].expand(v);
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          parts[i].out[j] = fmaf(scores[step][i], v[j], parts[i].out[j]);
        }
      }
    }
  }
  // Slots of a warp, then warps.
  __shared__ Part shared[kWarps][kQueries][kWarp];
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    for (int distance = lanes; distance < kWarp; distance *= 2) {
      Part other;
      other.max = __shfl_xor_sync(kFullMask, parts[i].max, distance);
      other.sum = __shfl_xor_sync(kFullMask, parts[i].sum, distance);
      for (int j = 0; j < 8; ++j) {
        other.out[j] = __shfl_xor_sync(kFullMask, parts[i].out[j], distance);
      }
      parts[i].merge(other);
    }
    if (lane < lanes) shared[warp][i][lane] = parts[i];
  }
  __syncthreads();
  for (int item = threadIdx.x; item < n_queries * lanes; item += kThreads) {
    const int i = item / lanes, c = item % lanes;
    Part total = shared[0][i][c];
    for (int w = 1; w < kWarps; ++w) total.merge(shared[w][i][c]);
    const int64_t head = first_head + i;
    if (n_splits == 1) {
      float* out = job.out + (int64_t{row} * n_heads + head) * cache.head_dim;
      for (int j = 0; j < 8; ++j) {
        if (c * 8 + j < cache.head_dim) out[c * 8 + j] = total.out[j] / total.sum;
      }
    } else {
      float* out = job.partials +
                   ((int64_t{row} * n_heads + head) * n_splits + split) * (cache.head_dim + 2);
      if (c == 0) out[0] = total.max, out[1] = total.sum;
      for (int j = 0; j < 8; ++j) {
        if (c * 8 + j < cache.head_dim) out[2 + c * 8 + j] = total.out[j];
      }
    }
  }
  if (n_splits == 1) return;
  finish_stretch(job, int64_t{row} * n_heads + first_head, n_queries);
}

template <int kBits>
void launch_bits(const AttentionJob& job, const Gpu& gpu) {
  int lanes = 1;
  while (lanes * 8 < job.cache.head_dim) lanes *= 2;
  const int64_t group_size = job.n_heads / job.cache.n_kv_heads;
  const int64_t n_queries = group_size == 1 ? 1 : kMaxQueries;
  const auto kernel = group_size == 1 ? decode_kernel<kBits, 1> : decode_kernel<kBits, kMaxQueries>;
  const dim3 grid(
      static_cast<unsigned>(job.n_splits),
      static_cast<unsigned>(job.cache.n_kv_heads * ((group_size + n_queries - 1) / n_queries)),
      static_cast<unsigned>(job.rows));
  launch_kernel(gpu, "attention", kernel, grid, dim3(kThreads), 0, job, lanes);
}

}  // namespace

int64_t attention_splits(const CacheView& cache, int64_t rows, int64_t max_keys, const Gpu& gpu) {
  if (rows > kMatvecRows) return 1;
  // As many blocks as the device holds at once; less than kMinStretch keys are not worth a merge.
  const bool f16 = attention_f16_takes(cache);
  const int64_t min_stretch = f16 ? 2 * kMinStretch : kMinStretch;
  const int64_t wanted =
      (f16 ? 3 : 4) * gpu.facts.n_sms / std::max<int64_t>(1, rows * cache.n_kv_heads);
  const int64_t n_splits = std::clamp<int64_t>(
      wanted, 1, std::min<int64_t>(kMaxSplits, (max_keys + min_stretch - 1) / min_stretch));
  // A cluster of blocks merges sooner; of more keys the memory is what takes time.
  const int64_t most = most_of_cluster(gpu);
  return f16 && most > 1 && max_keys <= kClusterKeys
             ? std::bit_floor(static_cast<uint64_t>(std::min(n_splits, most)))
             : n_splits;
}

int64_t attention_partials(int64_t rows, int64_t n_heads, int64_t head_dim, int64_t n_splits) {
  return n_splits == 1 ? 0 : rows * n_heads * n_splits * (head_dim + 2);
}

void launch_attention_decode(const AttentionJob& job, const Gpu& gpu) {
  TQ_CHECK(job.cache.head_dim <= 256 && job.rows < 65536 && job.n_splits <= kMaxSplits);
  TQ_CHECK(job.n_heads % job.cache.n_kv_heads == 0);
  TQ_CHECK(job.n_splits == 1 || job.rows * job.n_heads <= kAttentionCounters);
  if (job.rows == 0) return;
  if (attention_f16_takes(job.cache)) return launch_attention_f16(job, gpu);
  switch (job.cache.bits) {
    case 32:
      launch_bits<32>(job, gpu);
      break;
    case 16:
      launch_bits<16>(job, gpu);
      break;
    case 8:
      launch_bits<8>(job, gpu);
      break;
    default:
      launch_bits<4>(job, gpu);
      break;
  }
}

}  // namespace tq::cuda
