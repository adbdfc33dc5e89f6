// packed_matvec - 4-bit linears for up to 16 tokens: weights stream through once, at the memory's
// speed.
//
// packed_matvec - y_s (+)= x' R_s^T + h_s' B_s^T for all linears s that read the same rounded x
// Shapes    R, B in fragment order (weights.h), x', h' rounded rows (m <= 16), y_s [m, out_s] f32
// Work      a block a panel of 16 rows; its warps take every kWarps-th block of 64 columns, of R,
//           then of B; sums of the warps are added through shared memory in a fixed order. One row
//           of up to 4096 columns is normed and rounded here, by every block, which then takes
//           panel after panel: a kernel that only did that would cost more than all blocks' work.
//           So is one row of x A^T, which the kernel ahead makes while this one reads R
// Memory    each code read once by one lane, 16 bytes at a time, a few blocks asked for while as
//           many are multiplied, the first ones before the kernel's turn -> DRAM. x' comes from the
//           caches or from shared memory: 64 bytes a token and block
// Constants few instructions a block of 64 columns (30 for one token): at 100 a multiprocessor
//           issues them no faster than an H200's memory delivers. So addresses are steps from the
//           last ones, and lanes of absent tokens read the last one's row. The weights are operand
//           A of mma m16n8k32, tokens are the 8 columns of B; one token fills all of them
// Requires  m <= 16; groups of 32 to 256 columns or whole rows (weights.cpp, fits_fragments)
// Error     dots exact; groups are added in another order than the CPU's: gamma_n_groups
//           sum_g |scale dot|; tests/test_cuda_linears.cpp
// Source    kernels of Marlin (Frantar et al. 2024) for the offline fragment order
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/mma.cuh"
#include "cuda/row_block.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

// kRoundsInput: one token, whose row every block of threads rounds. kUnroll: how many blocks of
// columns a warp asks for at once.
template <int kTokens_, bool kRoundsInput_, bool kGroups32_, int kUnroll_, int kResident_ = 2>
struct Shape {
  static constexpr int kTokens = kTokens_, kTiles = (kTokens + 7) / 8, kUnroll = kUnroll_;
  static constexpr bool kRoundsInput = kRoundsInput_;
  // Warps of a block of threads, and how many blocks a multiprocessor has room for.
  static constexpr int kWarps = 8, kResident = kResident_;
  static constexpr int kScales = kGroups32_ ? 2 : 1;           // of a block of 64 columns
  static constexpr int kSums = kTokens == 1 ? 2 : 4 * kTiles;  // of a lane
};

// Where a lane stands: one matrix, one panel, its rows and its tokens, a block of 64 columns. Moves
// on with what it loads. kNear: the rows are in shared memory.
template <typename S, bool kNear>
struct Stream {
  static constexpr int kWarps = S::kWarps, kTiles = S::kTiles, kScales = S::kScales;
  static constexpr int kStep = kWarps * 64;  // columns from one block of a warp to the next

  const uint4* codes;
  const __half2* scales;
  const uint8_t* x[kTiles];
  const float* x_scales;  // of the lane's two tokens, or of the one
  int w_step, x_step;     // between the scales of a warp's blocks
  int w_half, x_half;     // between those of a block's halves

  /// first_block: of 128 columns.
  __device__ Stream(const FragmentView& w, const RoundedRows& rows, int panel, int first_block,
                    int n_tokens) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int first = first_block * static_cast<int>(kBlockCols) + warp * 64;
    const auto group = [](int col, int shift) { return col >> shift; };
    codes = panel_codes(w, panel) + (first_block + warp / 2) * kSetCodes + warp % 2 * kWarp + lane;
    scales = panel_scales(w, panel) + group(first, w.group_shift) * kSetScales + lane / 4;
    w_step = group(kStep, w.group_shift) * kSetScales;
    w_half = group(32, w.group_shift) * kSetScales;
    constexpr int kRow = kMatvecRows;
    x_step = group(kStep, rows.group_shift) * kRow;
    x_half = group(32, rows.group_shift) * kRow;
    x_scales = rows.scales + group(first, rows.group_shift) * kRow;
    if (S::kTokens > 1) x_scales += lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int token = S::kTokens == 1 ? 0 : min(tile * 8 + lane / 4, n_tokens - 1);
      x[tile] = rows.codes + token * static_cast<int>(rows.padded_cols) + first + lane % 4 * 16;
    }
  }

  // Of some blocks of columns: everything that comes from far away is asked for before the first of
  // it is used.
  struct Tokens {
    uint4 b[kTiles];
    float2 scales[kScales][kTiles];
  };
  struct Loads {
    uint4 words[S::kUnroll];
    __half2 scales[S::kUnroll][kScales];
    Tokens tokens[kNear ? 1 : S::kUnroll];
  };
  template <int kCount>
  __device__ void load_weights(Loads& to) {
    constexpr int kCodes = kWarps / 2 * kSetCodes;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      to.words[i] = __ldcs(codes + i * kCodes);
#pragma unroll
      for (int j = 0; j < kScales; ++j) to.scales[i][j] = scales[i * w_step + j * w_half];
    }
    codes += kCount * kCodes;
    scales += kCount * w_step;
  }
  __device__ void load_tokens(int i, Tokens& to) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      to.b[tile] = *reinterpret_cast<const uint4*>(x[tile] + i * kStep);
#pragma unroll
      for (int j = 0; j < kScales; ++j) {
        const float* from = x_scales + i * x_step + j * x_half + tile * 8;
        if constexpr (S::kTokens == 1) {
          to.scales[j][tile].x = *from;
        } else {
          to.scales[j][tile] = *reinterpret_cast<const float2*>(from);
        }
      }
    }
  }
  template <int kCount>
  __device__ void skip_tokens() {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) x[tile] += kCount * kStep;
    x_scales += kCount * x_step;
  }
  template <int kCount>
  __device__ void load(Loads& to) {
    load_weights<kCount>(to);
    load_all_tokens<kCount>(to);
  }
  template <int kCount>
  __device__ void load_all_tokens(Loads& to) {
    if constexpr (!kNear) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) load_tokens(i, to.tokens[i]);
      skip_tokens<kCount>();
    }
  }

  // sums is 16 times what it is called.
  template <int kCount>
  __device__ void multiply(const Loads& from, float (&sums)[S::kSums]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Tokens near;
      if constexpr (kNear) load_tokens(i, near);
      const Tokens& tokens = kNear ? near : from.tokens[i];
      uint32_t a[2][4];
      expand_codes(from.words[i], a);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4& b = tokens.b[tile];
        IntTile dots;
        mma_s8(dots, a[0], b.x, b.y, dots_start());
        if constexpr (kScales == 2) {
          scale(dots, from.scales[i][0], tokens.scales[0][tile], sums + tile * 4);
          mma_s8(dots, a[1], b.z, b.w, dots_start());
        } else {
          mma_s8(dots, a[1], b.z, b.w, dots);
        }
        scale(dots, from.scales[i][kScales - 1], tokens.scales[kScales - 1][tile], sums + tile * 4);
      }
    }
    if constexpr (kNear) skip_tokens<kCount>();
  }
  __device__ static void scale(const IntTile& dots, __half2 half, float2 x, float* sums) {
    const float2 w = __half22float2(half);
    if constexpr (S::kTokens > 1) {
      add_scaled(dots, w, x, sums);
    } else {
      sums[0] = fmaf(__int_as_float(dots.at[0]) - kRoundMagic, w.x * x.x, sums[0]);
      sums[1] = fmaf(__int_as_float(dots.at[2]) - kRoundMagic, w.y * x.x, sums[1]);
    }
  }

  /// How many blocks of 64 columns are this warp's, of n blocks of 128.
  __device__ static int count(int n) {
    return (2 * n - static_cast<int>(threadIdx.x / kWarp) + kWarps - 1) / kWarps;
  }
  /// The weights of the first of the warp's n blocks, if they fill `to`.
  __device__ void begin(int n, Loads& to) {
    if (n >= S::kUnroll) load_weights<S::kUnroll>(to);
  }
  /// All n blocks of the warp, after begin(n, loads[0]).
  __device__ void run(int n, Loads (&loads)[2], float (&sums)[S::kSums]) {
    constexpr int kUnroll = S::kUnroll;
    int left = n / kUnroll;
    if (left > 0) load_all_tokens<kUnroll>(loads[0]);
    for (; left > 0; left -= 2) {
      if (left > 1) load<kUnroll>(loads[1]);
      multiply<kUnroll>(loads[0], sums);
      if (left == 1) break;
      if (left > 2) load<kUnroll>(loads[0]);
      multiply<kUnroll>(loads[1], sums);
    }
#pragma unroll 1
    for (int i = n % kUnroll; i > 0; --i) {
      load<1>(loads[0]);
      multiply<1>(loads[0], sums);
    }
  }
  /// n blocks of which nothing has been asked for, in a short program.
  __device__ void run_singly(int n, float (&sums)[S::kSums]) {
#pragma unroll 1
    for (; n > 0; --n) {
      Loads loads;
      load<1>(loads);
      multiply<1>(loads, sums);
    }
  }
};

// A row in shared memory: codes, then scales as in memory.
__host__ __device__ inline int64_t near_bytes(const RoundedRows& x) {
  return x.padded_cols + x.n_groups * kMatvecRows * 4;
}
__device__ inline RoundedRows near_row(const RoundedRows& x, uint8_t* at) {
  RoundedRows near = x;
  near.order = CodeOrder::kLanes;
  near.codes = at;
  near.scales = reinterpret_cast<float*>(at + x.padded_cols);
  return near;
}

/// A row that another kernel has rounded. By a block of threads.
__device__ void copy_row(const RoundedRows& from, const RoundedRows& to) {
  for (int i = threadIdx.x; i < from.padded_cols / 16; i += blockDim.x) {
    reinterpret_cast<uint4*>(to.codes)[i] = reinterpret_cast<const uint4*>(from.codes)[i];
  }
  for (int i = threadIdx.x; i < from.n_groups; i += blockDim.x) {
    to.scales[i * kMatvecRows] = from.scales[i * kMatvecRows];
  }
}

// What matvec_rounds() has ruled out is left out of the program: it runs through once, at the rate
// at which instructions are fetched.
__device__ RowsJob short_job(const RowsJob& job, const RoundedRows& to) {
  RowsJob result = job;
  result.term = result.up = nullptr;
  result.sum = result.expanded = nullptr;
  result.rounded = to;
  result.rounded.order = CodeOrder::kLanes;
  return result;
}
constexpr int kInputStretches = 4;  // of 128 columns, of a warp
constexpr int kMaxInput = 8 * kInputStretches * 128;
constexpr int kMaxNarrow = 256;

/// The input row: norm and rounding. By a block of threads.
__device__ void round_input(const RowsJob& before, const NormInput<kInputStretches>& norm,
                            const RoundedRows& to) {
  RowsJob job = short_job(before, to);
  job.n_parts = 1;
  const int stretch = threadIdx.x / kWarp * kInputStretches;
  const int col = stretch * 128 + threadIdx.x % kWarp * 4;
  float x[kInputStretches][4], unit = 0;
  load_columns(job, 0, col, x);
  if (job.gain) norm_columns(job, norm, x);
  if (job.level_group > 0) {
    unit = store_unit(job, 0, __uint_as_float(block_max(__float_as_uint(largest_of(x)))));
  }
  round_stretches(job, 0, stretch, unit, StretchPlace(job.rounded, 0), x);
  round_padding(job, 0);
}

/// The one row of x A^T, by the last warps: a stretch of 128 columns each.
__device__ void round_narrow(const RowsJob& narrow, const RoundedRows& to) {
  const int stretch = static_cast<int>(blockDim.x - 1 - threadIdx.x) / kWarp;
  const int n_stretches = static_cast<int>(to.padded_cols / 128), lane = threadIdx.x % kWarp;
  if (stretch >= n_stretches) return;
  RowsJob source = short_job(narrow, to);
  source.rows = 1;
  float x[1][4], unit = 0;
  load_columns(source, 0, stretch * 128 + lane * 4, x);
  if (narrow.level_group > 0) {
    float largest = largest_of(x);
    for (int i = 0; i < n_stretches; ++i) {
      if (i == stretch) continue;
      float other[1][4];
      load_columns(source, 0, i * 128 + lane * 4, other);
      largest = max_or_nan(largest, largest_of(other));
    }
    unit =
        level_unit(source, __uint_as_float(__reduce_max_sync(kFullMask, __float_as_uint(largest))));
    if (stretch == 0 && lane == 0) to.scales[0] = unit;
  }
  RowsJob job = source;
  job.cols = to.padded_cols;  // no scale is left undefined: times 0 it might be NaN
  round_stretches(job, 0, stretch, unit, StretchPlace(job.rounded, 0), x);
}

template <typename S>
__global__ void __launch_bounds__(S::kWarps* kWarp, S::kResident)
    packed_matvec_kernel(const __grid_constant__ PackedJob job) {
  using Columns = Stream<S, S::kRoundsInput>;
  constexpr bool kNearH = S::kTokens == 1;
  using LowRank = Stream<S, kNearH>;
  // [warp][token][row], for every second panel; 17 columns keep the stores of a warp apart.
  constexpr int kColumns = S::kTokens == 1 ? 1 : S::kTiles * 8, kPanel = kPanelRows;
  constexpr int kTurns = S::kRoundsInput ? 2 : 1;
  __shared__ float shared[kTurns][S::kWarps][kColumns][kPanel + 1];
  extern __shared__ uint4 near[];  // of one token: the input if it is rounded here, then h
  uint8_t* near_input = reinterpret_cast<uint8_t*>(near);
  uint8_t* near_h = near_input + (S::kRoundsInput ? near_bytes(job.x) : 0);
  const int rows = static_cast<int>(job.rows);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const RoundedRows input = S::kRoundsInput ? near_row(job.x, near_input) : job.x;

  int which = 0, panel = blockIdx.x;  // of all segments' panels
  const auto find_segment = [&] {
    for (; which < job.n_segments; ++which) {
      const int n_panels = static_cast<int>(job.segments[which].w.n_panels);
      if (panel < n_panels) return;
      panel -= n_panels;
    }
  };
  find_segment();
  typename Columns::Loads loads[2];
  int n_blocks, n_more;                // of 64 columns of R and of B, of the warp
  typename LowRank::Loads more_loads;  // the first one of B, of one token
  const auto start = [&] {
    const PackedSegment& segment = job.segments[which];
    const int all = static_cast<int>(segment.w.padded_cols / kBlockCols);
    n_blocks = Columns::count(segment.n_blocks > 0 ? segment.n_blocks : all);
    Columns columns(segment.w, input, panel, segment.first_block, rows);
    columns.begin(n_blocks, loads[0]);
    n_more = LowRank::count(static_cast<int>(segment.b.padded_cols / kBlockCols));
    if (kNearH && n_more > 0) {
      LowRank(segment.b, near_row(segment.h, near_h), panel, 0, rows)
          .template load_weights<1>(more_loads);
    }
    return columns;
  };
  Columns residual = start();
  bool h_is_late = kNearH && job.blocks_ahead > 0;
  const auto begin = [&] {
    if (!h_is_late) return begin_kernel();
    place_next_kernel();
    __threadfence();  // nothing old is left in the first-level cache
  };
  if constexpr (S::kRoundsInput) {
    const NormInput<kInputStretches> norm(job.before, warp * kInputStretches * 128 + lane * 4);
    begin();
    round_input(job.before, norm, input);
    __syncthreads();
  } else {
    begin();
  }
  int h_of = -1;  // the segment whose h is near
  for (int turn = 0;; turn ^= 1) {
    const PackedSegment& segment = job.segments[which];
    float sums[S::kSums] = {};
    residual.run(n_blocks, loads, sums);
    if (h_is_late) {
      await_kernel();
      h_is_late = false;
    }
    if (segment.b.n_panels > 0) {
      const RoundedRows h = kNearH ? near_row(segment.h, near_h) : segment.h;
      if (kNearH && h_of != which) {
        h_of = which;
        segment.narrow.bits < 16 ? round_narrow(segment.narrow, h) : copy_row(segment.h, h);
        __syncthreads();
      }
      if (!kNearH) {
        LowRank(segment.b, h, panel, 0, rows).run_singly(n_more, sums);
      } else if (n_more > 0) {
        LowRank(segment.b, h, panel, 0, rows).template multiply<1>(more_loads, sums);
        if (n_more > 1) {
          LowRank rest(segment.b, h, panel, S::kWarps / 2, rows);
          rest.run_singly(n_more - 1, sums);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) {
      // One token: the lanes of a row hold the same.
      const int token = S::kTokens == 1 ? 0 : i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int upper = S::kTokens == 1 ? i : i / 2 % 2;
      shared[turn][warp][token][lane / 4 + upper * 8] = sums[i];
    }
    const int token = threadIdx.x / kPanel, row = panel * kPanel + threadIdx.x % kPanel;
    bool more = false;
    if constexpr (S::kRoundsInput) {
      panel += gridDim.x;
      find_segment();
      more = which < job.n_segments;
      if (more) residual = start();
    }
    __syncthreads();
    if (token < rows && row < segment.w.rows) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < S::kWarps; ++i) sum += shared[turn][i][token][threadIdx.x % kPanel];
      store_output(segment, token, row, sum * 0.0625f);
    }
    if (!more) return;
  }
}

int64_t count_panels(const PackedJob& job) {
  int64_t n_panels = 0;
  for (int i = 0; i < job.n_segments; ++i) n_panels += job.segments[i].w.n_panels;
  return n_panels;
}

template <typename S>
void launch_shape(const PackedJob& job, const Gpu& gpu) {
  int64_t bytes = 0;
  for (int i = 0; i < job.n_segments; ++i) {
    const PackedSegment& segment = job.segments[i];
    if (S::kTokens == 1 && segment.b.n_panels > 0) {
      bytes = std::max(bytes, near_bytes(segment.h));
    }
  }
  if (S::kRoundsInput) bytes += near_bytes(job.x);
  if (bytes > gpu.facts.shared_bytes / 2) {
    throw Error(ErrorKind::kResource, "row too long for this GPU", gpu.facts.name,
                std::to_string(job.x.padded_cols) + " columns do not fit its shared memory");
  }
  const int64_t n_panels = count_panels(job);
  const int64_t first_wave = S::kResident * gpu.facts.n_sms;
  // A row that has been rounded serves several panels. The kernel ahead may still be there.
  const int64_t room = first_wave - std::min<int64_t>(job.blocks_ahead, first_wave / 2);
  const int64_t n_blocks = S::kRoundsInput ? std::min(n_panels, room) : n_panels;
  launch_kernel(gpu, "packed matvec", packed_matvec_kernel<S>,
                dim3(static_cast<unsigned>(n_blocks)), dim3(S::kWarps * kWarp), bytes, job);
}

template <bool kGroups32>
void launch_groups(const PackedJob& job, const Gpu& gpu) {
  constexpr int kLess = kGroups32 ? 2 : 1;
  if (job.before.bits < 16) return launch_shape<Shape<1, true, kGroups32, 4>>(job, gpu);
  if (job.rows == 1) return launch_shape<Shape<1, false, kGroups32, 4 / kLess>>(job, gpu);
  if (job.rows <= 8) return launch_shape<Shape<8, false, kGroups32, 4 / kLess>>(job, gpu);
  // More than the device has room for at once: rather more blocks than longer ones.
  count_panels(job) > 2 * gpu.facts.n_sms
      ? launch_shape<Shape<16, false, kGroups32, 1, 3>>(job, gpu)
      : launch_shape<Shape<16, false, kGroups32, 2 / kLess>>(job, gpu);
}

}  // namespace

bool matvec_rounds(const RowsJob& before) {
  return before.rows == 1 && before.cols <= kMaxInput && before.n_parts == 1 && !before.up &&
         !before.term && !before.normed && before.block == 0 && !before.expanded &&
         whole_stretches(before);
}

bool matvec_rounds_narrow(const RowsJob& narrow) {
  return narrow.rows == 1 && narrow.cols <= kMaxNarrow && whole_stretches(narrow);
}

void launch_packed_matvec(const PackedJob& job, const Gpu& gpu) {
  TQ_CHECK(job.rows <= kMatvecRows && job.x.order == CodeOrder::kLanes && job.n_segments > 0 &&
           job.n_segments <= kMaxLinears);
  TQ_CHECK(job.before.bits >= 16 || matvec_rounds(job.before));
  TQ_CHECK(job.blocks_ahead == 0 || job.rows == 1);
  if (job.rows == 0) return;
  smallest_group_shift(job) < 6 ? launch_groups<true>(job, gpu) : launch_groups<false>(job, gpu);
}

}  // namespace tq::cuda
