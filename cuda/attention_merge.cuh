// attention_merge.cuh - how stretches of keys that several blocks have worked off become one
// result, for attention_decode.cu and attention_f16.cu.
//
// A stretch leaves in job.partials, for every row and head, the largest score, the sum of the
// weights 2^(score - largest) and the weighted sum of the values [head_dim]; largest -inf: no keys,
// the rest means nothing.
#pragma once

#include "cuda/device.cuh"

namespace tq::cuda {

constexpr int kMaxSplits = 128, kMaxQueries = 4;

/// By the block of a row and some heads that ends last, all its threads: no second kernel is
/// needed. A warp takes 128 coordinates of a head.
__device__ inline void merge_stretches(const AttentionJob& job, int64_t first, int n_queries) {
  constexpr int kBatch = 8, kCoords = 4;  // loads under way at once, of a lane
  const int n = static_cast<int>(job.n_splits);
  const int lane = threadIdx.x % kWarp, n_warps = blockDim.x / kWarp;
  const int head_dim = static_cast<int>(job.cache.head_dim), stride = head_dim + 2;
  const int n_parts = (head_dim + kCoords * kWarp - 1) / (kCoords * kWarp);
  for (int item = threadIdx.x / kWarp; item < n_queries * n_parts; item += n_warps) {
    const int64_t head = first + item / n_parts;
    const int begin = item % n_parts * kCoords * kWarp + lane;
    const float* stretches = job.partials + head * n * stride;
    float max = -INFINITY, sum = 0, out[kCoords] = {};
    for (int from = 0; from < n; from += kWarp) {
      const int count = min(kWarp, n - from);
      float parts[kBatch][kCoords];
      const auto load = [&](int at) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const float* part = stretches + (from + min(at + i, count - 1)) * stride + 2;
#pragma unroll
          for (int j = 0; j < kCoords; ++j) {
            parts[i][j] = __ldcg(part + min(begin + j * kWarp, head_dim - 1));
          }
        }
      };
      load(0);
      // A lane a stretch.
      const float* own = stretches + (from + min(lane, count - 1)) * stride;
      const float own_top = __ldcg(own), own_sum = __ldcg(own + 1);
      const float top = lane < count ? own_top : -INFINITY;
      const float new_max = fmaxf(max, warp_max(top));
      const float above = new_max == -INFINITY ? 0.0f : new_max;  // -inf - -inf would be NaN
      const float keep = exp2f(max - above);
      const float weight = top == -INFINITY ? 0.0f : exp2f(top - above);
      max = new_max;
      sum = fmaf(sum, keep, weight == 0.0f ? 0.0f : weight * own_sum);
#pragma unroll
      for (int j = 0; j < kCoords; ++j) out[j] *= keep;
      for (int at = 0; at < count; at += kBatch) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const float by = at + i < count ? __shfl_sync(kFullMask, weight, at + i) : 0.0f;
#pragma unroll
          for (int j = 0; j < kCoords; ++j) {
            out[j] = fmaf(by == 0.0f ? 0.0f : parts[i][j], by, out[j]);
          }
        }
        if (at + kBatch < count) load(at + kBatch);
      }
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int j = 0; j < kCoords; ++j) {
      const int at = begin + j * kWarp;
      if (at < head_dim) job.out[head * head_dim + at] = out[j] / sum;
    }
  }
}

/// All threads of a block, when its part of job.partials is written: the last one merges, and is
/// told so.
__device__ inline bool finish_stretch(const AttentionJob& job, int64_t first, int n_queries) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t* counter = job.counters + blockIdx.z * gridDim.y + blockIdx.y;
    is_last = atomicAdd(counter, 1) == job.n_splits - 1;
    if (is_last) *counter = 0;
  }
  __syncthreads();
  if (!is_last) return false;
  __threadfence();
  merge_stretches(job, first, n_queries);
  return true;
}

}  // namespace tq::cuda
