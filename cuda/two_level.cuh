// two_level.cuh - what the products with two-level scales on Hopper share: stages of 128 columns in
// a ring, the thread that has them copied, and the warpgroups that multiply them, 128 rows of
// weights at a time. twin_gemm_two_level.cu says how.
#pragma once

#include "cuda/device.cuh"
#include "cuda/wgmma.cuh"

namespace tq::cuda::two_level {

constexpr int kConsumers = 256;  // threads
constexpr int kThreads = kConsumers + 128;
constexpr int64_t kTileRows = kSetPanels * kPanelRows, kMostCols = 1 << 16;

// kTokens: of a tile; kGroups32: a multiple for 32 columns, not 64 or more.
template <int kTokens_, bool kGroups32_>
struct Shape {
  static constexpr int kTokens = kTokens_, kGroups = kGroups32_ ? 4 : 2;
  static constexpr int kSums = kTokens / 2;                     // of a thread
  static constexpr int kPiece = kTokens < 128 ? kTokens : 128;  // tokens that lie together
  static constexpr int kStages = kTokens == 256 ? 5 : 6;
  static constexpr int kBlocksOfThreads = kTokens == 64 ? 2 : 1;  // of a multiprocessor
};

template <typename S>
struct alignas(1024) Stage {
  static_assert(S::kTokens % S::kPiece == 0);
  uint4 tokens[S::kTokens][8];           // as they lie in memory (code_offset)
  uint4 weights[kSetPanels][2 * kWarp];  // [panel][half of 64 columns, lane]
  uchar2 multiples[S::kGroups][kSetPanels][8];
};

template <typename S>
struct Shared {
  Stage<S> stages[S::kStages];
  Barrier full[S::kStages], free[S::kStages];
};

// The layout of x' and of weights that these kernels read.
inline bool takes_inputs(const RoundedRows& x) {
  return x.order == CodeOrder::kTiles && x.n_groups == 1;
}
inline bool takes_weights(const FragmentView& w) {
  return w.multiples && w.padded_cols <= kMostCols;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the kernels are empty

// Tokens lie in memory in steps of 128. Behind the last one: any, its sums are not stored.
__device__ inline int64_t token_step(int64_t token, int64_t last_step) {
  return min(token / kRowStep, last_step);
}

// One side of the product: a matrix and tokens over the same columns.
struct Side {
  const FragmentView& w;
  const RoundedRows& x;

  // One thread: the copies of columns [128 index, 128 index + 128), all reported to `full`.
  template <typename S>
  __device__ void load(Stage<S>& stage, int index, int64_t set, int64_t first_token,
                       int64_t last_step, Barrier& full) const {
    const int group_bytes = (kBlockCols >> min(w.group_shift, 7)) * kSetScales * 2;
    full.arrive_expecting(sizeof(stage.tokens) + sizeof(stage.weights) + group_bytes);
    const int64_t n_stages = w.padded_cols / kBlockCols,
                  group = index * kBlockCols >> w.group_shift;
    for (int i = 0; i < S::kTokens; i += S::kPiece) {
      const int64_t step = token_step(first_token + i, last_step);
      copy_bulk(stage.tokens[i],
                x.codes + (step * n_stages + index) * (kRowStep * kBlockCols) +
                    first_token % kRowStep * kBlockCols,
                S::kPiece * kBlockCols, full);
    }
    copy_bulk(stage.weights, panel_codes(w, set * kSetPanels) + index * kSetCodes, kSetCodes * 16,
              full);
    copy_bulk(stage.multiples, w.multiples + (set * w.n_groups + group) * kSetScales, group_bytes,
              full);
  }
};

// Unsigned nibbles 8 + code, four in a word, as bytes multiple * code. 128 keeps every byte's
// product positive, so that none borrows from the next.
__device__ inline uint32_t times_multiple(uint32_t nibbles, uint32_t multiple, uint32_t offsets) {
  return (nibbles * multiple + offsets) ^ 0x80808080u;
}

// A warpgroup at work: the two halves of a stage, each 64 rows x all tokens x 64 columns. While the
// tensor cores multiply one, the codes of the next are expanded.
template <typename S>
struct Warpgroup {
  int32_t sums[S::kSums] = {};
  uint32_t codes[2][2][4];  // of two halves in turn, two steps of 32 columns each
  int lane, panel;          // of the tile

  __device__ Warpgroup() : lane(threadIdx.x % kWarp), panel(threadIdx.x / kWarp) {}

  // group_step: log2 of the steps of 32 columns that share a multiple.
  __device__ void expand(const Stage<S>& stage, int half, int group_step) {
    const uint4 words = stage.weights[panel][half * kWarp + lane];
    const uint32_t rows[2][2] = {{words.x, words.y}, {words.z, words.w}};
    uint32_t multiples[2], offsets[2];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      if (step == 0 || S::kGroups == 4) {
        const uchar2 pair = stage.multiples[(half * 2 + step) >> group_step][panel][lane / 4];
        multiples[0] = pair.x, multiples[1] = pair.y;
        for (int i = 0; i < 2; ++i) offsets[i] = 0x80808080u - multiples[i] * 0x08080808u;
      }
      uint32_t(&to)[4] = codes[half][step];
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // rows lane / 4 and 8 further; signed nibbles become 8 + code
        const uint32_t low = (rows[step][i] ^ 0x88888888u) & 0x0F0F0F0Fu;
        const uint32_t high = (rows[step][i] >> 4 ^ 0x08080808u) & 0x0F0F0F0Fu;
        to[i] = times_multiple(low, multiples[i], offsets[i]);
        to[i + 2] = times_multiple(high, multiples[i], offsets[i]);
      }
    }
  }
  __device__ void start(const Stage<S>& stage, int half) {
    const uint64_t tokens = swizzled_rows(stage.tokens) + half * 4;
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      wgmma(sums, codes[half][step], tokens + step * 2, true);
    }
    wgmma_commit();
  }

  /// Stages [first, last) of all that the ring has had.
  __device__ void multiply(Shared<S>& shared, int first, int last, int group_step) {
    const auto stage_of = [&](int index) -> const Stage<S>& {
      return shared.stages[index % S::kStages];
    };
    const auto wait = [&](int index) {
      shared.full[index % S::kStages].wait(index / S::kStages % 2);
    };
    wait(first);
    expand(stage_of(first), 0, group_step);
    for (int index = first; index < last; ++index) {
      start(stage_of(index), 0);
      wgmma_wait<1>();  // nobody reads the registers that the next codes go to
      expand(stage_of(index), 1, group_step);
      start(stage_of(index), 1);
      if (index + 1 < last) {
        wait(index + 1);
        wgmma_wait<1>();
        expand(stage_of(index + 1), 0, group_step);
      }
      wgmma_wait<0>();
      hold(sums);
      shared.free[index % S::kStages].arrive();
    }
  }

  /// Sums become values, as the bits of floats: in the same registers.
  __device__ void to_floats(const FragmentView& w, const RoundedRows& x, int64_t set,
                            int64_t first_token, int64_t last_step) {
    const float2 units = w.units[(set * kSetPanels + panel) * 8 + lane / 4];
#pragma unroll
    for (int first = 0; first < S::kTokens; first += S::kPiece) {
      const int64_t step = token_step(first_token + first, last_step);
      const float* from = x.scales + step * kRowStep + first_token % kRowStep + lane % 4 * 2;
      float2 of_tokens[S::kPiece / 8];
#pragma unroll
      for (int i = 0; i < S::kPiece / 8; ++i) {
        of_tokens[i] = *reinterpret_cast<const float2*>(from + i * 8);
      }
#pragma unroll
      for (int i = 0; i < S::kPiece / 2; ++i) {
        const float of_token = i % 2 == 0 ? of_tokens[i / 4].x : of_tokens[i / 4].y;
        const float scale = (i % 4 < 2 ? units.x : units.y) * of_token;
        int32_t& sum = sums[first / 2 + i];
        sum = __float_as_int(static_cast<float>(sum) * scale);
      }
    }
  }
};

// By all threads, which then may use these and what thread 0 has initialised before.
template <typename S>
__device__ inline void init_barriers(Shared<S>& shared) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      shared.full[i].init(1);
      shared.free[i].init(kConsumers);  // one arrival a warp is no faster, and racecheck loses it
    }
    publish_barriers();
  }
  __syncthreads();
}

__device__ inline int group_step(const FragmentView& w) {
  return min(w.group_shift, 7) - 5;
}

#endif

}  // namespace tq::cuda::two_level
