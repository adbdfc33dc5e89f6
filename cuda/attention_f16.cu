// attention_f16 - attention of few rows over a long 16-bit cache, on the tensor cores: they leave
// the instructions that attention_decode.cu needs for products to the loads.
//
// attention - out = sum_j softmax_j(scale q.k_j) v_j over the keys j <= position of the row
// Shapes    q, out [rows, n_heads, head_dim] f32; keys, values [kv head, ctx, head_dim] f16
// Work      one row: heads.cu's work first, redone by every block (AttentionJob::heads).
//           A block: one row, one key head (queries that share it, up to 4), one stretch of keys;
//           each of its 4 warps takes every fourth 16 of them with an online softmax of its own.
//           Warps are merged through shared memory, stretches by their cluster of blocks or, if
//           they are many, by the block that ends last
// Memory    the cache of the row's positions once, straight into the operands of mma m16n8k16 ->
//           DRAM; 16 keys and 16 values a warp under way
// Constants 16 keys: the rows of an mma. Its 8 columns are 4 queries as a sum of two f16 each, so
//           that f32 queries and weights lose nothing (22 bits)
// Requires  head_dim 64 or 128
// Error     scores 2^-22 |q||k| scale beside f32 sums, weights 2^-22; tests/test_cuda_ops.cpp
// Source    online softmax (Milakov and Gimelshein 2018), flash-decoding (Dao et al. 2023)
#include <bit>

#include "cuda/attention_merge.cuh"
#include "cuda/mma.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp, kKeys = 16;

__device__ inline uint32_t pack(__half low, __half high) {
  const __half2 pair = __halves2half2(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
// x as a sum of two f16: the larger one or the rest.
__device__ inline __half part_of(float x, bool rest) {
  const __half high = __float2half_rn(x);
  return rest ? __float2half_rn(x - __half2float(high)) : high;
}
// An 8 x 8 matrix of f16, two of a row a lane, transposed.
__device__ inline uint32_t transpose(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// The queries as operand B: column n is query n % 4, its first part for n < 4, its rest above.
// Lane l holds of query l / 4 % 4 the coordinates 8 (l % 4 + 4 i).. of its chunks i.
template <int kDim>
struct Queries {
  static constexpr int kChunks = kDim / 32;
  uint32_t b[kChunks][4];
  float unscale[2];  // of the scores' queries 2 (l % 2), 2 (l % 2) + 1

  __device__ void load(const float* rows, int n_queries, float factor) {
    const int lane = threadIdx.x % kWarp, query = lane / 4 % 4;
    float x[kChunks][8], largest = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const float4* from = reinterpret_cast<const float4*>(rows + min(query, n_queries - 1) * kDim +
                                                           (lane % 4 + 4 * i) * 8);
      *reinterpret_cast<float4*>(x[i]) = from[0];
      *reinterpret_cast<float4*>(x[i] + 4) = from[1];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[i][j] *= factor;
        largest = fmaxf(largest, fabsf(x[i][j]));
      }
    }
    largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 2));
    // A power of two brings the largest to [2^14, 2^15), so that both parts are normal f16.
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
    const int shift = exponent == 128 ? 0 : min(14 - exponent, 100);
    const float scale = __uint_as_float(static_cast<uint32_t>(shift + 127) << 23);
    const float inverse = __uint_as_float(static_cast<uint32_t>(127 - shift) << 23);
    for (int i = 0; i < 2; ++i) {
      unscale[i] = __shfl_sync(kFullMask, inverse, (lane % 2 * 2 + i) * 4);
    }
    const bool rest = lane >= 16;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        b[i][j] = pack(part_of(x[i][2 * j] * scale, rest), part_of(x[i][2 * j + 1] * scale, rest));
      }
    }
  }
};

// 16 keys as operand A of their products with the queries: rows l / 4 and l / 4 + 8 in 16-byte
// words l % 4 + 4 i; the coordinates stand in an order of their own, the same as in Queries.
template <int kDim>
struct Keys {
  uint4 words[2][kDim / 32];

  __device__ void load(const CacheView& cache, int64_t base, int first, int end) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int key = min(first + lane / 4 + row * 8, end - 1);
      const uint4* from = reinterpret_cast<const uint4*>(cache.keys + (base + key) * (kDim * 2));
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) words[row][i] = __ldcs(from + lane % 4 + 4 * i);
    }
  }
  // Puts in the key at `place`, which was not in the cache yet.
  __device__ void put(const __half* newest, int place, int first, int end) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (min(first + lane / 4 + row * 8, end - 1) != place) continue;
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) {
        words[row][i] = reinterpret_cast<const uint4*>(newest)[lane % 4 + 4 * i];
      }
    }
  }
  // Scores of keys l / 4 (0, 1) and l / 4 + 8 (2, 3) with queries 2 (l % 2) and the next.
  __device__ void multiply(const Queries<kDim>& q, float (&scores)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] = 0;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      const uint4 &low = words[0][i], &high = words[1][i];
      const uint32_t first[4] = {low.x, high.x, low.y, high.y};
      const uint32_t second[4] = {low.z, high.z, low.w, high.w};
      mma_f16(scores, first, q.b[i][0], q.b[i][1]);
      mma_f16(scores, second, q.b[i][2], q.b[i][3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[i] += __shfl_xor_sync(kFullMask, scores[i], 2);  // the queries' two parts
      scores[i] *= q.unscale[i % 2];
    }
  }
};

// 16 values as operand A, transposed: rows are coordinates, columns are keys. Lane l holds words
// l / 4 (and l / 4 + 8) of keys 2 (l % 4), the next, and both + 8.
template <int kDim>
struct Values {
  static constexpr int kWords = kDim / 64, kTiles = kDim / 16;
  uint4 words[4][kWords];

  __device__ void load(const CacheView& cache, int64_t base, int first, int end) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = min(first + lane % 4 * 2 + i % 2 + i / 2 * 8, end - 1);
      const uint4* from = reinterpret_cast<const uint4*>(cache.values + (base + key) * (kDim * 2));
#pragma unroll
      for (int j = 0; j < kWords; ++j) words[i][j] = __ldcs(from + lane / 4 + 8 * j);
    }
  }
  __device__ void put(const __half* newest, int place, int first, int end) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (min(first + lane % 4 * 2 + i % 2 + i / 2 * 8, end - 1) != place) continue;
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        words[i][j] = reinterpret_cast<const uint4*>(newest)[lane / 4 + 8 * j];
      }
    }
  }
  // Coordinate of row l / 4 (+ 8) of tile j.
  static __device__ int coordinate(int tile, bool upper) {
    const int at = threadIdx.x % kWarp / 4 * 8 + tile;
    return upper ? at + (kDim == 128 ? 64 : 4) : at;
  }
  __device__ uint32_t half_of(int key, int at) const {  // a 16-bit pair (keys 2 key, 2 key + 1)
    const uint4 &a = words[2 * key][at / 8], &b = words[2 * key + 1][at / 8];
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
    return __byte_perm(x[at % 8 / 2], y[at % 8 / 2], at % 2 ? 0x7632 : 0x5410);
  }
  __device__ void multiply(const uint32_t (&weights)[2], float (*out)[4]) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int upper = tile + (kDim == 128 ? 8 : 4);
      const uint32_t a[4] = {half_of(0, tile), half_of(0, upper), half_of(1, tile),
                             half_of(1, upper)};
      mma_f16(out[tile], a, weights[0], weights[1]);
    }
  }
};

// Largest score, sum of weights, weighted values of a warp's keys. Of queries 2 (l % 2) and the
// next; `out` as the accumulators of Values, whose upper 4 columns belong to the weights' rests.
template <int kDim>
struct Softmax {
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  float out[kDim / 16][4] = {};

  // The weights of 16 keys as operand B.
  __device__ void weigh(const float (&scores)[4], uint32_t (&weights)[2]) {
    const bool rest = threadIdx.x % 4 >= 2;
    __half halves[4];
#pragma unroll
    for (int query = 0; query < 2; ++query) {
      float top = fmaxf(scores[query], scores[query + 2]);
      for (int step = 4; step < kWarp; step *= 2) {
        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, step));
      }
      top = fmaxf(top, max[query]);  // passes NaN by; the weights keep it
      const float above = top == -INFINITY ? 0.0f : top;
      const float keep = exp2f(max[query] - above);
      max[query] = top;
      sum[query] *= keep;
#pragma unroll
      for (int tile = 0; tile < kDim / 16; ++tile) {
        out[tile][query] *= keep;
        out[tile][query + 2] *= keep;
      }
#pragma unroll
      for (int key = 0; key < 2; ++key) {
        const float weight = exp2f(scores[query + 2 * key] - above + kWeightShift);
        sum[query] += weight;
        halves[query + 2 * key] = part_of(weight, rest);
      }
    }
    weights[0] = transpose(pack(halves[0], halves[1]));
    weights[1] = transpose(pack(halves[2], halves[3]));
  }
};

// heads.cu for one head in the registers of a warp: bit for bit the same.
template <int kDim>
struct Head {
  static constexpr int kCount = kDim / kWarp;
  float x[kCount];  // coordinates lane + 32 i
  float gains[kCount];
  float2 turns[kCount / 2];

  // What no kernel of the step writes.
  __device__ void load_constants(const HeadsJob& job, const float* gain, int pos) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kCount; ++i) gains[i] = gain ? gain[lane + kWarp * i] : 1.0f;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      turns[i] = job.angles ? job.angles[int64_t{pos} * (kDim / 2) + lane + kWarp * i]
                            : make_float2(1.0f, 0.0f);
    }
  }
  __device__ void load(const float* from) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = from[threadIdx.x % kWarp + kWarp * i];
  }
  __device__ void store(float* to) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[threadIdx.x % kWarp + kWarp * i] = x[i];
  }
  __device__ void store(__half* to) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      to[threadIdx.x % kWarp + kWarp * i] = __float2half_rn(x[i]);
    }
  }
  __device__ void turn(const HeadsJob& job, const float* gain) {
    if (gain) {
      double squares = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
      }
      const double mean = warp_sum(squares) / static_cast<double>(kDim);
      const float factor = norm_factor(mean, job.eps);
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = x[i] * factor * gains[i];
    }
    if (!job.angles) return;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float a = x[i], b = x[i + kCount / 2];
      x[i] = a * turns[i].x - b * turns[i].y;
      x[i + kCount / 2] = b * turns[i].x + a * turns[i].y;
    }
  }
};

// What OneRow leaves in shared memory.
template <int kDim>
struct alignas(16) NearRow {
  float queries[kMaxQueries][kDim];
  __half key[kDim], value[kDim];  // the newest
};

// Of the step's one row: query head `warp` of the block to shared memory, and the newest key and
// value there and to the cache, by the block whose stretch they belong to.
template <int kDim>
struct OneRow {
  Head<kDim> query, key;

  __device__ void load_constants(const HeadsJob& job, int pos) {
    query.load_constants(job, job.q_gain, pos);
    key.load_constants(job, job.k_gain, pos);
  }
  __device__ void run(const HeadsJob& job, int64_t first_head, int n_queries, int kv_head, int pos,
                      bool newest, bool wanted, NearRow<kDim>& near) {
    const int warp = threadIdx.x / kWarp;
    const bool with_key = newest && warp == kWarps - 1, with_value = newest && warp == 0;
    Head<kDim> value;
    if (warp < n_queries) query.load(job.q + (first_head + warp) * kDim);
    if (with_key) key.load(job.k + kv_head * kDim);
    if (with_value) value.load(job.v + kv_head * kDim);
    const int64_t place = (kv_head * job.cache.ctx + pos) * kDim;
    if (with_key) {
      key.turn(job, job.k_gain);
      if (wanted) key.store(job.k + kv_head * kDim);
      key.store(reinterpret_cast<__half*>(job.cache.keys) + place);
      key.store(near.key);
    }
    if (with_value) {
      value.store(reinterpret_cast<__half*>(job.cache.values) + place);
      value.store(near.value);
    }
    if (warp < n_queries) {
      query.turn(job, job.q_gain);
      query.store(near.queries[warp]);
    }
    __syncthreads();
  }
};

// Stretches become one result inside their cluster: every block is sent its share of the outputs
// of all. `item`: query * kDim + coordinate.
template <int kDim>
struct ClusterMerge {
  float tops[kMostOfCluster][kMaxQueries], sums[kMostOfCluster][kMaxQueries];  // [stretch][query]
  float outs[kMaxQueries * kDim];  // [stretch][item of this block's share]
  float weights[kMostOfCluster][kMaxQueries], totals[kMaxQueries];

  __device__ void send_out(int n_queries, int item, float out) {
    const int share = n_queries * kDim / gridDim.x;
    store_in_cluster(outs + blockIdx.x * share + item % share, item / share, out);
  }
  __device__ void send_top(int query, float top, float sum) {
    for (int rank = 0; rank < gridDim.x; ++rank) {
      store_in_cluster(&tops[blockIdx.x][query], rank, top);
      store_in_cluster(&sums[blockIdx.x][query], rank, sum);
    }
  }
  /// When all have sent. out: of the first query.
  __device__ void merge(int n_queries, float* out) {
    const int n = gridDim.x, share = n_queries * kDim / n;
    const int lane = threadIdx.x % kWarp, query = threadIdx.x / kWarp;
    static_assert(kWarps == kMaxQueries && kMostOfCluster <= kWarp);
    if (query < n_queries) {
      const float top = lane < n ? tops[lane][query] : -INFINITY, max = warp_max(top);
      const float weight = top == -INFINITY ? 0.0f : exp2f(top - (max == -INFINITY ? 0.0f : max));
      const float total = warp_sum(weight == 0.0f ? 0.0f : weight * sums[lane % n][query]);
      if (lane < n) weights[lane][query] = weight;
      if (lane == 0) totals[query] = total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < share; i += kThreads) {
      const int item = blockIdx.x * share + i;
      float sum = 0;
#pragma unroll 4
      for (int stretch = 0; stretch < n; ++stretch) {
        const float weight = weights[stretch][item / kDim];
        sum = fmaf(weight == 0.0f ? 0.0f : outs[stretch * share + i], weight, sum);
      }
      out[item] = sum / totals[item / kDim];
    }
  }
};

// kClustered: the blocks of a row and key head are a cluster.
template <int kDim, bool kClustered>
__global__ void __launch_bounds__(kThreads, 3)
    f16_kernel(const __grid_constant__ AttentionJob job) {
  if constexpr (kClustered) arrive_at_cluster();  // no block's memory is written before it is there
  const CacheView& cache = job.cache;
  const int n_heads = static_cast<int>(job.n_heads), n_splits = static_cast<int>(job.n_splits);
  const int group_size = n_heads / static_cast<int>(cache.n_kv_heads);
  const int query_blocks = (group_size + kMaxQueries - 1) / kMaxQueries;
  const int kv_head = static_cast<int>(blockIdx.y) / query_blocks;
  const int first_query = (static_cast<int>(blockIdx.y) - kv_head * query_blocks) * kMaxQueries;
  const int n_queries = min(kMaxQueries, group_size - first_query);
  const int split = blockIdx.x, row = blockIdx.z;
  const int64_t first_head = int64_t{row} * n_heads + kv_head * group_size + first_query;
  const int64_t base = kv_head * cache.ctx;
  // What the step reads (ops.h) was sent before its first kernel began, and keys of earlier steps
  // are older still: both may be read before the kernel ahead has ended.
  const int pos0 = job.input->pos0, n_keys = pos0 + row + 1;
  constexpr int kStep = kWarps * kKeys;
  const int stretch = ((n_keys + n_splits - 1) / n_splits + kStep - 1) / kStep * kStep;
  const int begin = min(split * stretch, n_keys), end = min(begin + stretch, n_keys);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  Keys<kDim> keys;
  Values<kDim> values;
  int key = begin + warp * kKeys;
  const auto load = [&](int at) {
    keys.load(cache, base, at, end);
    values.load(cache, base, at, end);
  };
  // Of one row the newest key and value are put in later.
  const bool early = key < end && (job.heads.q || min(key + kKeys, end) <= pos0);
  if (early) load(key);
  __shared__ NearRow<kDim> near;
  const float* from = job.q + first_head * kDim;
  if (job.heads.q) {
    OneRow<kDim> heads;
    heads.load_constants(job.heads, pos0);
    begin_kernel();
    const bool newest = begin <= pos0 && pos0 < end;
    heads.run(job.heads, first_head, n_queries, kv_head, pos0, newest, job.heads_wanted, near);
    from = near.queries[0];
    if (newest) {
      keys.put(near.key, pos0, key, end);
      values.put(near.value, pos0, key, end);
    }
  } else {
    begin_kernel();
  }
  if (!early && key < end) load(key);
  Softmax<kDim> softmax;
  if (key < end) {
    Queries<kDim> q;
    q.load(from, n_queries, job.scale * kLog2E);
    for (; key < end; key += kStep) {
      const bool more = key + kStep < end;
      float scores[4];
      keys.multiply(q, scores);
      if (more) keys.load(cache, base, key + kStep, end);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (key + lane / 4 + i / 2 * 8 >= end) scores[i] = -INFINITY;
      }
      uint32_t weights[2];
      softmax.weigh(scores, weights);
      values.multiply(weights, softmax.out);
      if (more) values.load(cache, base, key + kStep, end);
    }
  }
  __shared__ float tops[kWarps][kMaxQueries], sums[kWarps][kMaxQueries];
  __shared__ float outs[kWarps][kMaxQueries][kDim];
  __shared__ ClusterMerge<kDim> merge;
  if constexpr (kClustered) wait_for_cluster();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = softmax.sum[i];
    for (int step = 4; step < kWarp; step *= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
    const int query = lane % 2 * 2 + i;
    if (lane < 2) tops[warp][query] = softmax.max[i], sums[warp][query] = sum;
#pragma unroll
    for (int tile = 0; tile < kDim / 16; ++tile) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        float out = softmax.out[tile][i + 2 * upper];
        out += __shfl_xor_sync(kFullMask, out, 2);
        if (lane % 4 < 2) outs[warp][query][Values<kDim>::coordinate(tile, upper)] = out;
      }
    }
  }
  __syncthreads();
  for (int item = threadIdx.x; item < n_queries * kDim; item += kThreads) {
    const int query = item / kDim, at = item % kDim;
    float max = tops[0][query], sum = 0, out = 0;
    for (int i = 1; i < kWarps; ++i) max = fmaxf(max, tops[i][query]);
    const float above = max == -INFINITY ? 0.0f : max;
    for (int i = 0; i < kWarps; ++i) {
      const float weight = exp2f(tops[i][query] - above);  // 0 without keys
      sum = fmaf(sums[i][query], weight, sum);
      out = fmaf(outs[i][query][at], weight, out);
    }
    if constexpr (kClustered) {
      merge.send_out(n_queries, item, out);
      if (at == 0) merge.send_top(query, max, sum);
    } else if (n_splits == 1) {
      job.out[(first_head + query) * kDim + at] = out / sum;
    } else {
      float* to = job.partials + ((first_head + query) * n_splits + split) * (kDim + 2);
      if (at == 0) to[0] = max, to[1] = sum;
      to[2 + at] = out;
    }
  }
  if constexpr (kClustered) {
    sync_cluster();
    merge.merge(n_queries, job.out + first_head * kDim);
    if (split > 0) return;
  } else if (n_splits > 1 && !finish_stretch(job, first_head, n_queries)) {
    return;
  }
  // Every block has read q.
  if (!job.heads.q || !job.heads_wanted) return;
  for (int item = threadIdx.x; item < n_queries * kDim; item += kThreads) {
    job.heads.q[first_head * kDim + item] = near.queries[item / kDim][item % kDim];
  }
}

}  // namespace

bool attention_f16_takes(const CacheView& cache) {
  return cache.bits == 16 && (cache.head_dim == 64 || cache.head_dim == 128);
}

bool attention_takes_heads(const HeadsJob& job) {
  return job.rows == 1 && attention_f16_takes(job.cache) && job.block == 0 && job.q && job.store &&
         job.n_heads <= job.n_kv_heads * kMaxQueries;
}

void launch_attention_f16(const AttentionJob& job, const Gpu& gpu) {
  TQ_CHECK(attention_f16_takes(job.cache) &&
           (!job.heads.q || (job.heads.q == job.q && attention_takes_heads(job.heads))));
  const int64_t group_size = job.n_heads / job.cache.n_kv_heads;
  const int64_t query_blocks = (group_size + kMaxQueries - 1) / kMaxQueries;
  const dim3 grid(static_cast<unsigned>(job.n_splits),
                  static_cast<unsigned>(job.cache.n_kv_heads * query_blocks),
                  static_cast<unsigned>(job.rows));
  const bool narrow = job.cache.head_dim == 64;
  const bool clustered = job.n_splits > 1 && job.n_splits <= most_of_cluster(gpu) &&
                         std::has_single_bit(static_cast<uint64_t>(job.n_splits));
  const auto kernel = clustered ? (narrow ? f16_kernel<64, true> : f16_kernel<128, true>)
                                : (narrow ? f16_kernel<64, false> : f16_kernel<128, false>);
  launch_clusters(gpu, "attention", kernel, grid, dim3(kThreads), 0,
                  clustered ? static_cast<unsigned>(job.n_splits) : 1, job);
}

}  // namespace tq::cuda
