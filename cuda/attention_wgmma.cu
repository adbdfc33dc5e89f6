// attention_wgmma - causal attention of many rows on Hopper: both products by wgmma.
//
// attention - out = sum_j softmax_j(scale q.k_j) v_j over the keys j <= position of the row
// Shapes    q, out [rows, n_heads, head_dim] f32; keys, values [kv head, ctx, head_dim] in 16, 8 or
//           4 bits, read as f16
// Work      a block stays on its multiprocessor and takes 128 queries at a time (all query heads of
//           a key head, row by row) with all keys that they see. One warpgroup of 128 threads fills
//           a ring of tiles (attention_ring.cuh); two multiply 64 queries each: q is operand A of
//           the scores, weights are operand A of the sums, both in registers. The scores of a tile
//           are multiplied before the sums of the tile before, and weighed while those are. The
//           queries with the most keys go first, and every other round is dealt backwards
// Memory    128 keys and values: 64 KB for 2^22 products, three times in the ring (32 KB and six
//           times of head_dim 64). Bound: 2048 clocks of tensor cores for 128 queries x 128 keys of
//           128, beside 1024 of exp and some 480 instructions of each of 8 warps
// Constants 128 x 128: scores (64), sums (64), q and weights (32 each) of 64 queries fill the
//           registers. Tried without gain: the two warpgroups taking turns by named barriers, the
//           next q loaded during the last sums or prefetched, sums left alone where no maximum has
//           moved
// Requires  sm_90a; head_dim a multiple of 8, at most 128; bits of the cache at most 16
// Error     q, the weights and values of 8- and 4-bit caches are rounded to f16: scores move by
//           2^-11 |q||k| scale, the sum by 2^-11 max|v|; powers are within 2^-22;
//           tests/test_cuda_ops.cpp
// Source    FlashAttention-3 (Shah et al. 2024)
// Measured  H100, 32 heads over 8 of 128, 16 bits, `bench_cuda attention`, 2026-11-24: 4096 rows
// 243
//           us, 565 TFLOP/s (57 % of peak; mma.sync 627 us); more in docs/results.md
#include <algorithm>

#include "cuda/attention_ring.cuh"
#include "cuda/device.cuh"
#include "cuda/mma.cuh"
#include "cuda/wgmma.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the kernel is empty

// d (+)= A B for a warpgroup, in the background: A [64, 16] f16, each warp 16 rows as in mma_f16;
// B [16, 2 x registers of d] f16 in shared memory, K along its rows there, or across (kTransposed).
template <bool kTransposed>
__device__ inline void wgmma_f16(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %37, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" TQ_SUM_NAMES_32
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38; }"
      : TQ_SUMS_32("+f", d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),
        "n"(kTransposed ? 1 : 0));
}

template <bool kTransposed>
__device__ inline void wgmma_f16(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %69, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" TQ_SUM_NAMES_64
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70; }"
      : TQ_SUMS_64("+f", d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),
        "n"(kTransposed ? 1 : 0));
}

// 2^x within 2^-22 of it; 0 below 2^-126.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A warpgroup that multiplies: 64 queries with all keys that they see.
template <int kDim>
struct Consumer {
  static constexpr int kStages = Shared<kDim>::kStages, kSteps = kDim / 16;

  Shared<kDim>& shared;
  int lane, column;                 // of the lane's first score, and of its coordinates
  uint32_t q[kSteps][4];            // f16, times scale and log2 e: exp(x) = 2^(x log2 e)
  float scores[kKeys / 2];          // 8 columns after the other, four of them here
  uint32_t weights[kKeys / 16][4];  // f16
  float sums[kDim / 2];             // of weights and values
  // Of rows lane / 4 and + 8 of the warp's 16:
  float max[2], sum[2], keep[2];
  int64_t at[2];  // where the query lies
  int limit[2];   // keys that it sees
  bool known[2];

  __device__ explicit Consumer(Shared<kDim>& from) : shared(from) {
    lane = threadIdx.x % kWarp, column = lane % 4 * 2;
  }
  __device__ void load(const Work& work) {
    const AttentionJob& job = work.job;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.first_query + threadIdx.x / kWarp * 16 + lane / 4 + 8 * i;
      known[i] = row < work.n_queries;
      const int query = min(row, work.n_queries - 1);
      const int head = work.kv_head * work.group + query % work.group;
      at[i] = (query / work.group * job.n_heads + head) * job.cache.head_dim;
      limit[i] = work.pos0 + query / work.group + 1;
    }
    const int head_dim = static_cast<int>(job.cache.head_dim);
    const float factor = job.scale * kLog2E;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int col = k * 16 + i / 2 * 8 + column;
        float2 x = make_float2(0, 0);
        if (col < head_dim) x = *reinterpret_cast<const float2*>(job.q + at[i % 2] + col);
        q[k][i] = pack_half(x.x * factor, x.y * factor);
      }
    }
  }
  __device__ void store(const AttentionJob& job) {
    const int head_dim = static_cast<int>(job.cache.head_dim);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(kFullMask, sum[i], 1);
      sum[i] += __shfl_xor_sync(kFullMask, sum[i], 2);
      const float by = 1.0f / sum[i];
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int col = n * 8 + column;
        if (!known[i] || col >= head_dim) continue;
        *reinterpret_cast<float2*>(job.out + at[i] + col) =
            make_float2(sums[4 * n + 2 * i] * by, sums[4 * n + 2 * i + 1] * by);
      }
    }
  }

  __device__ void wait(const Place<kStages>& place, int part) {
    shared.full[place.stage][part].wait(place.round % 2);
  }
  __device__ void release(const Place<kStages>& place, int part) {
    __syncwarp();
    if (lane == 0) shared.free[place.stage][part].arrive();
  }
  __device__ void start_scores(const Place<kStages>& place) {
    const uint64_t keys = swizzled_rows(&shared.tiles[place.stage][0]);
    hold(scores);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      constexpr int kNext64 = sizeof(shared.tiles[0][0].words[0]) / 16;
      wgmma_f16<false>(scores, q[k], keys + k / 4 * kNext64 + k % 4 * 2, k > 0);
    }
    wgmma_commit();
  }
  __device__ void start_sums(const Place<kStages>& place, bool add) {
    // Here K goes from row to row, and the next 64 columns are the next rows of 128 bytes: their
    // distance stands where swizzled_rows() has a 1 that is not read.
    constexpr uint64_t kNext64 = sizeof(shared.tiles[0][0].words[0]) / 16;
    const uint64_t values = swizzled_rows(&shared.tiles[place.stage][1]) + ((kNext64 - 1) << 16);
    hold(sums);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      wgmma_f16<true>(sums, weights[k], values + k * (16 * 128 / 16), k > 0 || add);
    }
    wgmma_commit();
  }
  // Scores of keys first.. to weights 2^(score - max); keep: what the sums so far are worth.
  __device__ void weigh(int first) {
    hold(scores);
    if (first + kKeys > min(limit[0], limit[1])) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        if (first + i / 4 * 8 + column + i % 2 >= limit[i / 2 % 2]) scores[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float top = max[row];
#pragma unroll
      for (int j = 2 * row; j < kKeys / 2; j += 4) {
        top = fmaxf(top, fmaxf(scores[j], scores[j + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
      keep[row] = power_of_two(max[row] - top);
      max[row] = top;
      float part = 0;
#pragma unroll
      for (int j = 2 * row; j < kKeys / 2; j += 4) {
        scores[j] = power_of_two(scores[j] - top);
        scores[j + 1] = power_of_two(scores[j + 1] - top);
        part += scores[j] + scores[j + 1];
      }
      sum[row] = fmaf(sum[row], keep[row], part);
    }
    hold(scores);
  }
  __device__ void round_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {
      weights[i / 4][i % 4] = pack_half(scores[2 * i], scores[2 * i + 1]);
    }
  }

  /// All tiles from `place` on. The first one shows every row a key: no maximum is -inf after it.
  __device__ void attend(int n_tiles, Place<kStages>& place) {
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0;
    wait(place, 0);
    start_scores(place);
    wgmma_wait<0>();
    release(place, 0);
    weigh(0);
    round_weights();
    if (n_tiles > 1) wait(place.next(), 0);
    for (int tile = 1; tile < n_tiles; ++tile) {
      const Place<kStages> before = place;
      place = place.next();
      start_scores(place);
      wait(before, 1);
      start_sums(before, tile > 1);
      wgmma_wait<1>();
      release(place, 0);
      weigh(tile * kKeys);
      // Stands here for the compiler: it would move the next wait up, in front of the powers.
      if (tile + 1 < n_tiles) wait(place.next(), 0);
      wgmma_wait<0>();
      hold(sums);
      release(before, 1);
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) sums[i] *= keep[i / 2 % 2];
      round_weights();
    }
    wait(place, 1);
    start_sums(place, n_tiles > 1);
    wgmma_wait<0>();
    hold(sums);
    release(place, 1);
    place = place.next();
  }

  __device__ void run(Work& work) {
    Place<kStages> place;
    for (int round = 0; work.take(round); ++round) {
      load(work);
      attend((work.n_keys + kKeys - 1) / kKeys, place);
      store(work.job);
    }
  }
};

template <int kDim, int kBits>
__device__ inline void run(const AttentionJob& job) {
  extern __shared__ __align__(1024) uint8_t bytes[];
  auto& shared = *reinterpret_cast<Shared<kDim>*>(bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * Shared<kDim>::kStages; ++i) {
      shared.full[i / 2][i % 2].init(kWarpgroup / kWarp);
      shared.free[i / 2][i % 2].init(kConsumers * kWarpgroup / kWarp);
    }
  }
  __syncthreads();
  begin_kernel();
  Work work(job);
  // Both together: all that the block was launched with.
  constexpr int kProducers = kBits == 16 ? 40 : 56;
  if (threadIdx.x >= kConsumers * kWarpgroup) {
    give_registers<kProducers>();
    Producer<kDim, kBits> producer(shared, work);
    if constexpr (kBits == 16) {
      producer.copy_tiles();
    } else {
      producer.expand_tiles();
    }
    return;
  }
  take_registers<252 - kProducers / 2>();
  Consumer<kDim>(shared).run(work);
}

#endif

template <int kDim, int kBits>
__global__ void __launch_bounds__(kThreads, 1)
    attention_wgmma_kernel(const __grid_constant__ AttentionJob job) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  run<kDim, kBits>(job);
#endif
}

template <int kDim>
void launch_dim(const AttentionJob& job, const Gpu& gpu) {
  const int64_t n_queries = job.rows * (job.n_heads / job.cache.n_kv_heads);
  const int64_t n_works = (n_queries + kQueries - 1) / kQueries * job.cache.n_kv_heads;
  const int64_t n_blocks = std::min<int64_t>(n_works, gpu.facts.n_sms);
  const auto kernel = job.cache.bits == 16  ? attention_wgmma_kernel<kDim, 16>
                      : job.cache.bits == 8 ? attention_wgmma_kernel<kDim, 8>
                                            : attention_wgmma_kernel<kDim, 4>;
  launch_kernel(gpu, "attention wgmma", kernel, dim3(static_cast<unsigned>(n_blocks)),
                dim3(kThreads), sizeof(Shared<kDim>), job);
}

}  // namespace

bool attention_wgmma_takes(const CacheView& cache, const Gpu& gpu) {
  return gpu.facts.major == 9 && cache.bits <= 16 && cache.head_dim % 8 == 0 &&
         cache.head_dim <= 128;
}

void launch_attention_wgmma(const AttentionJob& job, const Gpu& gpu) {
  TQ_CHECK(attention_wgmma_takes(job.cache, gpu));
  job.cache.head_dim <= 64 ? launch_dim<64>(job, gpu) : launch_dim<128>(job, gpu);
}

}  // namespace tq::cuda
