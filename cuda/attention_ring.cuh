// attention_ring - the tiles of keys and values that attention_wgmma.cu multiplies: the queries
// that they are for, their ring in shared memory, and the warpgroup that fills it.
//
// Tiles of 16 bits are brought by cp.async, 16 bytes to their swizzled place: padding of head_dim,
// the end of the keys and caches of codes, which pass through registers, are then the same loop,
// and no driver has to describe a tensor to the copy engine. That engine (tensor maps, tried on 16
// bits) made attention 5 % faster at head_dim 128 and no faster at 64.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/mma.cuh"
#include "cuda/wgmma.cuh"

namespace tq::cuda {

constexpr int kWarpgroup = 128, kConsumers = 2;  // threads; warpgroups that multiply
constexpr int kThreads = (kConsumers + 1) * kWarpgroup, kQueries = 64 * kConsumers, kKeys = 128;

// Vectors of 128 keys, 64 coordinates after the other: rows of 128 bytes, swizzled as wgmma reads
// them.
template <int kDim>
struct alignas(1024) Tile {
  uint4 words[kDim / 64][kKeys][8];
};

template <int kDim>
struct Shared {
  static constexpr int kStages = 384 / kDim;
  Tile<kDim> tiles[kStages][2];  // keys, values
  Barrier full[kStages][2], free[kStages][2];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the kernel is empty

// 16 bytes, or zeros, into shared memory in the background.
__device__ inline void copy_or_zero(uint32_t to, const void* from, bool copy) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(copy ? 16 : 0)
               : "memory");
}

__device__ inline void store_shared(uint32_t to, const uint4& words) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

// Where in the ring of stages.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t round = 0;
  __device__ Place next() const {
    return stage + 1 < kStages ? Place{stage + 1, round} : Place{0, round + 1};
  }
};

// The 128 queries at hand: of one key head, and the keys that the last of them sees.
struct Work {
  const AttentionJob& job;
  int group, n_queries, n_blocks, pos0;
  int kv_head, first_query, n_keys;

  __device__ explicit Work(const AttentionJob& of) : job(of) {
    group = static_cast<int>(job.n_heads / job.cache.n_kv_heads);
    n_queries = static_cast<int>(job.rows) * group;
    n_blocks = (n_queries + kQueries - 1) / kQueries;
    pos0 = job.input->pos0;
  }
  /// False if this round has none for the block.
  __device__ bool take(int round) {
    const int n = static_cast<int>(gridDim.x), me = static_cast<int>(blockIdx.x);
    const int index = round * n + (round % 2 ? n - 1 - me : me);
    const int n_kv_heads = static_cast<int>(job.cache.n_kv_heads);
    if (index >= n_blocks * n_kv_heads) return false;
    first_query = (n_blocks - 1 - index / n_kv_heads) * kQueries;
    kv_head = index % n_kv_heads;
    n_keys = pos0 + (min(first_query + kQueries, n_queries) - 1) / group + 1;
    return true;
  }
};

// 8 codes of a vector as f16, rounded once: code * by.x + by.y. A byte of code c in the low bits of
// 1024 makes 1024 + c.
__device__ inline __half2 scaled(uint32_t codes, __half2 factor, __half2 offset, __half2 by) {
  const __half2 code = __hfma2(reinterpret_cast<const __half2&>(codes), factor, offset);
  return __hfma2(code, __low2half2(by), __high2half2(by));
}
__device__ inline uint4 expand(uint2 codes, __half2 by) {
  const __half2 one = __float2half2_rn(1.0f), offset = __float2half2_rn(-1024.0f);
  __half2 x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = i < 2 ? codes.x : codes.y;
    x[i] = scaled(pick_bytes(word, 0x64646464u, i % 2 ? 0x4342u : 0x4140u), one, offset, by);
  }
  return reinterpret_cast<const uint4&>(x);
}
__device__ inline uint4 expand(uint32_t codes, __half2 by) {
  // The high nibble of a byte stays where it is: 1024 + 16 c.
  const __half2 factor = __floats2half2_rn(1.0f, 0.0625f);
  const __half2 offset = __floats2half2_rn(-1024.0f, -64.0f);
  __half2 x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = pick_bytes(codes, 0x64646464u, 0x4040u + i * 0x0101u) & 0xFFF0FF0Fu;
    x[i] = scaled(pair, factor, offset, by);
  }
  return reinterpret_cast<const uint4&>(x);
}

// The warpgroup that fills the ring: keys and values, in turn, of all of the block's work. A thread
// has the same 8 coordinates of every kStep-th key.
template <int kDim, int kBits>
struct Producer {
  static constexpr int kStages = Shared<kDim>::kStages;
  static constexpr int kWords = kDim / 8, kStep = kWarpgroup / kWords, kPieces = kKeys / kStep;
  // Tiles under way while the next is asked for. A tile is given back when the third after it has
  // come (Consumer::attend), so with more the ring would wait for itself.
  static constexpr int kLag = 2;
  static_assert(kLag <= 2 * kStages - 4);

  Shared<kDim>& shared;
  Work& work;
  int lane, word, key;
  bool inside, more;  // coordinates of the vector; tiles
  int round = 0, first = 0, part = 0;

  __device__ Producer(Shared<kDim>& to, Work& all) : shared(to), work(all) {
    const int thread = threadIdx.x % kWarpgroup;
    lane = thread % kWarp, word = thread % kWords, key = thread / kWords;
    inside = word * 8 < work.job.cache.head_dim;
    more = work.take(0);
  }
  __device__ void next() {
    part ^= 1;
    if (part == 1) return;
    first += kKeys;
    if (first < work.n_keys) return;
    first = 0;
    more = work.take(++round);
  }
  // The thread's first vector of the tile at hand, counted from the first of the layer, and how
  // many keys further the last one is.
  __device__ int64_t vector() const { return work.kv_head * work.job.cache.ctx + first + key; }
  __device__ int reach() const { return more && inside ? work.n_keys - 1 - first - key : -1; }
  // Where the n-th tile of all goes, once that is free.
  __device__ uint32_t place_of(int n) {
    const int stage = n / 2 % kStages;
    if (n >= 2 * kStages) shared.free[stage][n % 2].wait((n / (2 * kStages) - 1) % 2);
    return shared_address(&shared.tiles[stage][n % 2].words[word / 8][key][(word ^ key) & 7]);
  }
  // It has come, as far as this warp brings it.
  __device__ void publish(int n) {
    if (n < 0) return;
    publish_writes();
    __syncwarp();
    if (lane == 0) shared.full[n / 2 % kStages][n % 2].arrive();
  }

  /// 16 bits: copies.
  __device__ void copy_tiles() {
    const CacheView& cache = work.job.cache;
    int n = 0;
    while (more) {
#pragma unroll
      for (int i = 0; i < 2; ++i, ++n) {
        const uint32_t to = place_of(n);
        const int last = reach();
        const uint8_t* from = (i == 0 ? cache.keys : cache.values) + vector() * cache.vector_bytes +
                              (inside ? word * 16 : 0);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          copy_or_zero(to + piece * kStep * 128, from, piece * kStep <= last);
          from += kStep * cache.vector_bytes;
        }
        commit();
        wait_for<kLag>();
        publish(n - kLag);
        next();
      }
    }
    wait_for<0>();
    for (int i = kLag; i > 0; --i) publish(n - i);
  }

  /// Codes: expands a tile while the codes of the next are on their way. A lane fetches the scale
  /// of one of the warp's 32 keys for all. Padding of head_dim becomes the minimum: q is 0 there,
  /// and sums are not stored.
  __device__ void expand_tiles() {
    using Codes = std::conditional_t<kBits == 8, uint2, uint32_t>;
    constexpr int kTogether = kWarp / kWords;  // keys
    const CacheView& cache = work.job.cache;
    const int first_key = key - lane / kWords;  // of the warp
    const int scale_key = first_key + lane % kTogether + lane / kTogether * kStep;
    Codes codes[kPieces];
    __half2 scale, next_scale;
    const uint8_t* from;
    int last;
    const auto begin = [&] {
      const int64_t vector = work.kv_head * cache.ctx + first;
      from = (part == 0 ? cache.keys : cache.values) + (vector + key) * cache.vector_bytes +
             word * kBits;
      last = reach();
      next_scale = {};  // of zeros
      if (more && first + scale_key < work.n_keys) {
        next_scale = (part == 0 ? cache.key_scales : cache.value_scales)[vector + scale_key];
      }
    };
    const auto fetch = [&](int i) {
      codes[i] = {};
      if (i * kStep <= last) codes[i] = *reinterpret_cast<const Codes*>(from);
      from += kStep * cache.vector_bytes;
    };
    begin();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) fetch(i);
    for (int n = 0; more; ++n) {
      scale = next_scale;
      next();
      begin();
      const uint32_t to = place_of(n);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const __half2 by = __shfl_sync(kFullMask, scale, i * kTogether + lane / kWords);
        store_shared(to + i * kStep * 128, expand(codes[i], by));
        fetch(i);
      }
      publish(n);
    }
  }
};

#endif

}  // namespace tq::cuda
