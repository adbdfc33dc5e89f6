// twin_gemm_two_level - 4-bit linears with two-level scales for many tokens on Hopper, by wgmma.
//
// twin_gemm_two_level - y_s (+)= x' R_s^T + h_s' B_s^T for all linears s that read the same x'
// Shapes    R, B in fragment order with multiples (weights.h), x', h' bytes in tiles with one scale
//           a row, y_s [m, out_s] f32
// Work      a tile is 128 rows of weights x 256 tokens (128 or 64 where that fills the device
//           better); a block of threads takes one tile after the other. As in twin_gemm.cu one
//           thread has stages of 128 columns copied and two warpgroups multiply 64 rows each, but a
//           weight times its multiple is a byte, so that sums of integers run on over all columns,
//           and floats are only needed at the end. Outputs of R wait in shared memory while those
//           of B are made: the registers hold one of them
// Memory    a tile takes 8 KB of weights and 32 KB of tokens for every 128 columns: 105 products a
//           byte of second-level cache. Outputs are stored while the next tile's first stages
//           arrive and are multiplied
// Constants 64 x 64 weights take some 60 instructions a warp to expand, and 256 clocks of the
//           tensor cores at 256 tokens: hidden, but for the registers that both use. At 128 tokens
//           and twice the rows shared memory is the limit (docs/results.md): nibbles, tokens and
//           what the tensor cores read of them
// Requires  sm_90a; groups of 2^n >= 32 columns or whole rows; rank <= 256; at most 2^16 columns
// Error     integers exact (120 * 128 * 2^16 < 2^31); each component's sum is rounded to f32, times
//           one product of two scales; tests/test_cuda_linears.cpp
// Source    weights times whole multiples as in QServe (Lin et al. 2024), where tokens have 8 bits;
//           persistent tiles as in DeepGEMM and CUTLASS
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/wgmma.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kConsumers = 256;  // threads
constexpr int kThreads = kConsumers + 128;
constexpr int64_t kTileRows = kSetPanels * kPanelRows, kMostCols = 1 << 16, kMostRank = 256;

// kTokens: of a tile; kGroups32: a multiple for 32 columns, not 64 or more.
template <int kTokens_, bool kGroups32_>
struct Shape {
  static constexpr int kTokens = kTokens_, kGroups = kGroups32_ ? 4 : 2;
  static constexpr int kSums = kTokens / 2;                     // of a thread
  static constexpr int kPiece = kTokens < 128 ? kTokens : 128;  // tokens that lie together
  static constexpr int kStages = kTokens == 256 ? 5 : 6;
  static constexpr int kBlocksOfThreads = kTokens == 64 ? 2 : 1;  // of a multiprocessor
  // Outputs on the shelf: floats of a thread in a stage's memory; stages that leaves for B.
  static constexpr int kShelfOfStage = kTokens == 256 ? 32 : 16;
  static constexpr int kLowRankStages = std::min(kStages - kSums / kShelfOfStage, 2);
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
  Barrier shelf_free;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the kernel is empty

// Tokens lie in memory in steps of 128. Behind the last one: any, its sums are not stored.
__device__ inline int64_t token_step(int64_t token, int64_t last_step) {
  return min(token / kRowStep, last_step);
}

// Which outputs a tile has, and the stages that it takes.
struct Tile {
  const PackedSegment* segment;
  int64_t set, first_token;  // set: its 128 rows
  int n_main, n_stages;
  template <typename S>
  __device__ static Tile at(const PackedJob& job, int index, S) {
    const int n_token_tiles = static_cast<int>((job.rows + S::kTokens - 1) / S::kTokens);
    Tile tile;
    tile.first_token = index % n_token_tiles * int64_t{S::kTokens};
    tile.set = index / n_token_tiles;
    tile.segment = job.segments;
    const auto n_sets = [&] { return (tile.segment->w.rows + kTileRows - 1) / kTileRows; };
    while (tile.set >= n_sets()) {
      tile.set -= n_sets();
      ++tile.segment;
    }
    const PackedSegment& segment = *tile.segment;
    tile.n_main = segment.n_blocks > 0 ? segment.n_blocks
                                       : static_cast<int>(segment.w.padded_cols / kBlockCols);
    tile.n_stages = tile.n_main + static_cast<int>(segment.b.padded_cols / kBlockCols);
    return tile;
  }
};

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
  __device__ void to_floats(const FragmentView& w, const RoundedRows& x, const Tile& tile,
                            int64_t last_step) {
    const float2 units = w.units[(tile.set * kSetPanels + panel) * 8 + lane / 4];
#pragma unroll
    for (int first = 0; first < S::kTokens; first += S::kPiece) {
      const int64_t step = token_step(tile.first_token + first, last_step);
      const float* from = x.scales + step * kRowStep + tile.first_token % kRowStep + lane % 4 * 2;
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

// Outputs of R while those of B are made: in the stages that follow, which the producer leaves
// alone until shelf_free.
template <typename S>
struct Shelf {
  Shared<S>& shared;
  int first_stage;
  __device__ float& at(int i) const {
    static_assert(sizeof(Stage<S>) >= S::kShelfOfStage * kConsumers * 4);
    auto& stage = shared.stages[(first_stage + i / S::kShelfOfStage) % S::kStages];
    return reinterpret_cast<float*>(&stage)[i % S::kShelfOfStage * kConsumers + threadIdx.x];
  }
  /// Zeros stay behind.
  __device__ void put(int32_t (&sums)[S::kSums]) const {
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) {
      at(i) = __int_as_float(sums[i]);
      sums[i] = 0;
    }
  }
  __device__ void add_to(int32_t (&sums)[S::kSums]) const {
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) {
      sums[i] = __float_as_int(__int_as_float(sums[i]) + at(i));
    }
    publish_writes();  // copies follow these accesses
    shared.shelf_free.arrive();
  }
};

template <typename S>
__device__ void store_outputs(const PackedJob& job, const Tile& tile, int panel,
                              int32_t (&sums)[S::kSums]) {
  const PackedSegment& segment = *tile.segment;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = tile.set * kTileRows + panel * kPanelRows + lane / 4;
  const auto each = [&](const auto& visit) {
    each_sum(sums, row, segment.w.rows, tile.first_token, job.rows, visit);
  };
  // One after the other, so that no load waits for the one before it; for the stream nobody waits.
  if (segment.accumulate) {
    each([&](int64_t at, int32_t& value) {
      value = __float_as_int(__int_as_float(value) + segment.y[at]);
    });
  }
  if (segment.y) each([&](int64_t at, int32_t& value) { segment.y[at] = __int_as_float(value); });
  if (segment.stream) {
    each(
        [&](int64_t at, int32_t& value) { atomicAdd(segment.stream + at, __int_as_float(value)); });
  }
}

template <typename S>
__device__ inline void produce(const PackedJob& job, Shared<S>& shared, int n_tiles) {
  const int64_t last_step = (job.rows - 1) / kRowStep;
  int index = 0, n_shelves = 0;  // of all tiles
  for (int i = blockIdx.x; i < n_tiles; i += gridDim.x) {
    const Tile tile = Tile::at(job, i, S());
    const PackedSegment& segment = *tile.segment;
    const Side main = {segment.w, job.x}, low_rank = {segment.b, segment.h};
    for (int stage = 0; stage < tile.n_stages; ++stage, ++index) {
      const int slot = index % S::kStages, round = index / S::kStages;
      if (round > 0) shared.free[slot].wait((round - 1) % 2);
      if (stage < tile.n_main) {
        main.load(shared.stages[slot], segment.first_block + stage, tile.set, tile.first_token,
                  last_step, shared.full[slot]);
      } else {
        low_rank.load(shared.stages[slot], stage - tile.n_main, tile.set, tile.first_token,
                      last_step, shared.full[slot]);
      }
    }
    if (tile.n_main < tile.n_stages) shared.shelf_free.wait(n_shelves++ % 2);
  }
}

template <typename S>
__device__ inline void consume(const PackedJob& job, Shared<S>& shared, int n_tiles) {
  const int64_t last_step = (job.rows - 1) / kRowStep;
  const auto group_step = [](const FragmentView& w) { return min(w.group_shift, 7) - 5; };
  Warpgroup<S> warpgroup;
  int index = 0;  // of a stage, of all tiles
  for (int i = blockIdx.x; i < n_tiles; i += gridDim.x) {
    const Tile tile = Tile::at(job, i, S());
    const PackedSegment& segment = *tile.segment;
    const int low_rank = index + tile.n_main, end = index + tile.n_stages;
    warpgroup.multiply(shared, index, low_rank, group_step(segment.w));
    warpgroup.to_floats(segment.w, job.x, tile, last_step);
    if (low_rank < end) {
      const Shelf<S> shelf = {shared, end};
      asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");  // all stages of R are done
      shelf.put(warpgroup.sums);
      warpgroup.multiply(shared, low_rank, end, group_step(segment.b));
      warpgroup.to_floats(segment.b, segment.h, tile, last_step);
      shelf.add_to(warpgroup.sums);
    }
    store_outputs<S>(job, tile, warpgroup.panel, warpgroup.sums);
#pragma unroll
    for (int j = 0; j < S::kSums; ++j) warpgroup.sums[j] = 0;
    index = end;
  }
}

template <typename S>
__device__ inline void run(const PackedJob& job, int n_tiles) {
  extern __shared__ __align__(1024) uint8_t bytes[];
  auto& shared = *reinterpret_cast<Shared<S>*>(bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      shared.full[i].init(1);
      shared.free[i].init(kConsumers);  // one arrival a warp is no faster, and racecheck loses it
    }
    shared.shelf_free.init(kConsumers);
    publish_barriers();
  }
  __syncthreads();
  begin_kernel();
  if (threadIdx.x >= kConsumers) {
    give_registers<24>();
    if (threadIdx.x == kConsumers) produce(job, shared, n_tiles);
  } else {
    // All that the block was launched with, less the producer's.
    take_registers<S::kBlocksOfThreads == 2 ? 104 : 240>();
    consume(job, shared, n_tiles);
  }
}

#endif

template <typename S>
__global__ void __launch_bounds__(kThreads, S::kBlocksOfThreads)
    twin_gemm_two_level_kernel(const __grid_constant__ PackedJob job, int n_tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  run<S>(job, n_tiles);
#endif
}

template <typename S>
int64_t count_tiles(const PackedJob& job) {
  int64_t n_sets = 0;
  for (int i = 0; i < job.n_segments; ++i) {
    n_sets += (job.segments[i].w.rows + kTileRows - 1) / kTileRows;
  }
  return n_sets * ((job.rows + S::kTokens - 1) / S::kTokens);
}

int64_t low_rank_stages(const PackedJob& job) {
  int64_t n_stages = 0;
  for (int i = 0; i < job.n_segments; ++i) {
    n_stages = std::max(n_stages, job.segments[i].b.padded_cols / kBlockCols);
  }
  return n_stages;
}

template <typename S>
void launch_shape(const PackedJob& job, const Gpu& gpu) {
  const int64_t n_tiles = count_tiles<S>(job);
  TQ_CHECK(n_tiles < 1 << 30 && low_rank_stages(job) <= S::kLowRankStages);
  const int64_t n_blocks = std::min<int64_t>(n_tiles, gpu.facts.n_sms * S::kBlocksOfThreads);
  launch_kernel(gpu, "twin gemm", twin_gemm_two_level_kernel<S>,
                dim3(static_cast<unsigned>(n_blocks)), dim3(kThreads), sizeof(Shared<S>), job,
                static_cast<int>(n_tiles));
}

template <bool kGroups32>
void launch_groups(const PackedJob& job, const Gpu& gpu) {
  using Large = Shape<256, kGroups32>;
  using Medium = Shape<128, kGroups32>;
  using Small = Shape<64, kGroups32>;
  // Rounds of the device times what a tile takes, as measured at 4096 columns (microseconds, H100);
  // a small one less if its multiprocessor has no second one.
  const int64_t n_sms = gpu.facts.n_sms;
  const auto rounds = [&](int64_t tiles) { return (tiles + n_sms - 1) / n_sms; };
  const int64_t large = rounds(count_tiles<Large>(job)) * 28;
  const int64_t medium = rounds(count_tiles<Medium>(job)) * 18;
  const int64_t small_rounds = rounds(count_tiles<Small>(job));
  const int64_t small = small_rounds / 2 * 23 + small_rounds % 2 * 14;
  const bool large_takes = low_rank_stages(job) <= Large::kLowRankStages;
  if (large_takes && large <= std::min(medium, small)) return launch_shape<Large>(job, gpu);
  medium <= small ? launch_shape<Medium>(job, gpu) : launch_shape<Small>(job, gpu);
}

}  // namespace

bool takes_two_level(const PackedJob& job, const Gpu& gpu) {
  if (gpu.facts.major != 9 || job.x.order != CodeOrder::kTiles || job.x.n_groups != 1) return false;
  for (int i = 0; i < job.n_segments; ++i) {
    const PackedSegment& segment = job.segments[i];
    if (!segment.w.multiples || segment.w.padded_cols > kMostCols) return false;
    if (segment.b.n_panels == 0) continue;
    if (!segment.b.multiples || segment.h.n_groups != 1 || segment.b.padded_cols > kMostRank) {
      return false;
    }
  }
  return true;
}

void launch_twin_gemm_two_level(const PackedJob& job, const Gpu& gpu) {
  TQ_CHECK(job.n_segments > 0 && job.n_segments <= kMaxLinears && takes_two_level(job, gpu));
  if (job.rows == 0) return;
  const int shift = smallest_group_shift(job);
  TQ_CHECK(shift >= 5);
  shift == 5 ? launch_groups<true>(job, gpu) : launch_groups<false>(job, gpu);
}

}  // namespace tq::cuda
