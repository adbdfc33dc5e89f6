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
#include "cuda/two_level.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

using namespace two_level;

constexpr int64_t kMostRank = 256;

// Outputs on the shelf (Shelf): floats of a thread in a stage's memory; stages that leaves for B.
template <typename S>
constexpr int kShelfOfStage = S::kTokens == 256 ? 32 : 16;
template <typename S>
constexpr int kLowRankStages = std::min(S::kStages - S::kSums / kShelfOfStage<S>, 2);

template <typename S>
struct SharedWithShelf : Shared<S> {
  Barrier shelf_free;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the kernel is empty

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

// Outputs of R while those of B are made: in the stages that follow, which the producer leaves
// alone until shelf_free.
template <typename S>
struct Shelf {
  SharedWithShelf<S>& shared;
  int first_stage;
  __device__ float& at(int i) const {
    static_assert(sizeof(Stage<S>) >= kShelfOfStage<S> * kConsumers * 4);
    auto& stage = shared.stages[(first_stage + i / kShelfOfStage<S>) % S::kStages];
    return reinterpret_cast<float*>(&stage)[i % kShelfOfStage<S> * kConsumers + threadIdx.x];
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
__device__ inline void produce(const PackedJob& job, SharedWithShelf<S>& shared, int n_tiles) {
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
__device__ inline void consume(const PackedJob& job, SharedWithShelf<S>& shared, int n_tiles) {
  const int64_t last_step = (job.rows - 1) / kRowStep;
  Warpgroup<S> warpgroup;
  int index = 0;  // of a stage, of all tiles
  for (int i = blockIdx.x; i < n_tiles; i += gridDim.x) {
    const Tile tile = Tile::at(job, i, S());
    const PackedSegment& segment = *tile.segment;
    const int low_rank = index + tile.n_main, end = index + tile.n_stages;
    warpgroup.multiply(shared, index, low_rank, group_step(segment.w));
    warpgroup.to_floats(segment.w, job.x, tile.set, tile.first_token, last_step);
    if (low_rank < end) {
      const Shelf<S> shelf = {shared, end};
      asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");  // all stages of R are done
      shelf.put(warpgroup.sums);
      warpgroup.multiply(shared, low_rank, end, group_step(segment.b));
      warpgroup.to_floats(segment.b, segment.h, tile.set, tile.first_token, last_step);
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
  auto& shared = *reinterpret_cast<SharedWithShelf<S>*>(bytes);
  if (threadIdx.x == 0) shared.shelf_free.init(kConsumers);
  init_barriers(shared);
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
  TQ_CHECK(n_tiles < 1 << 30 && low_rank_stages(job) <= kLowRankStages<S>);
  const int64_t n_blocks = std::min<int64_t>(n_tiles, gpu.facts.n_sms * S::kBlocksOfThreads);
  launch_kernel(gpu, "twin gemm", twin_gemm_two_level_kernel<S>,
                dim3(static_cast<unsigned>(n_blocks)), dim3(kThreads), sizeof(SharedWithShelf<S>),
                job, static_cast<int>(n_tiles));
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
  const bool large_takes = low_rank_stages(job) <= kLowRankStages<Large>;
  if (large_takes && large <= std::min(medium, small)) return launch_shape<Large>(job, gpu);
  medium <= small ? launch_shape<Medium>(job, gpu) : launch_shape<Small>(job, gpu);
}

}  // namespace

bool takes_two_level(const PackedJob& job, const Gpu& gpu) {
  if (gpu.facts.major != 9 || !takes_inputs(job.x)) return false;
  for (int i = 0; i < job.n_segments; ++i) {
    const PackedSegment& segment = job.segments[i];
    if (!takes_weights(segment.w)) return false;
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
