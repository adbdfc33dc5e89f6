// rows - everything that happens to a row of activations before a matrix product, in one pass. Few
// rows, and rows of unusual widths; else many_rows.cu.
//
// rows - x' = round(H(rms_norm(silu(sum x + term) * up)))   each part optional (kernels.h, RowsJob)
// Shapes    x, term, up [rows, cols] f32; codes [rows, padded_cols] s8, scales [group, row] f32
// Work      a block of threads a row, or 512 columns of one of few; it stays in shared memory
//           between the parts; a warp rounds a group, or 128 columns. Few rows that nothing but
//           loading comes before are shared out by 128 columns a warp; two-level scales want the
//           greatest of a row first, so that its blocks are a cluster. Of few rows a transform with
//           a base matrix is two kernels of many blocks: butterflies, then the base matrix
// Memory    each input read once, each wanted result written once -> DRAM in prefill; decode is
//           one row, so one block: latency
// Constants 32 floats + 1 of padding in shared memory: the butterflies of neighbouring elements
//           meet no bank twice
// Requires  a row fits shared memory: cols <= 24,000 on any device, 56,000 on sm_90 and sm_80 / 2
// Error     sums of squares in double (below half an ulp of f32); all else takes the CPU's
//           operations in the CPU's order: bit for bit but for exp (2 ulp).
//           tests/test_cuda_ops.cpp; rounding: tests/test_cuda_linears.cpp
// Source    docs/format.md, "Rounding of activations"; radix-8 butterflies as in any FFT
#include <algorithm>
#include <type_traits>

#include "cuda/hadamard.cuh"
#include "cuda/row_block.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kChunk = 512;  // columns of a block where several share a row: whole groups

__device__ inline float silu(float x) {
  return x / (1.0f + expf(-x));
}

// Elements [at, at + kCount) on their way into shared memory, element i there; the sum of their
// squares. Not `own`: another block's, wanted for the squares only.
template <int kCount>
__device__ double load_elements(const RowsJob& job, int64_t at, int i, bool own, float* v) {
  using Vector = std::conditional_t<kCount == 4, float4, float>;
  const auto get = [&](const float* from) { return *reinterpret_cast<const Vector*>(from + at); };
  Vector vector = get(job.x);
  float* x = reinterpret_cast<float*>(&vector);
  for (int64_t part = 1; part < job.n_parts; ++part) {
    const Vector more = get(job.x + part * job.rows * job.cols);
    for (int j = 0; j < kCount; ++j) x[j] += reinterpret_cast<const float*>(&more)[j];
  }
  if (job.term) {
    const Vector terms = get(job.term);
    for (int j = 0; j < kCount; ++j) x[j] += reinterpret_cast<const float*>(&terms)[j];
  }
  if (job.up) {
    const Vector factors = get(job.up);
    for (int j = 0; j < kCount; ++j)
      x[j] = silu(x[j]) * reinterpret_cast<const float*>(&factors)[j];
  }
  if (job.sum && own) *reinterpret_cast<Vector*>(job.sum + at) = vector;
  double squares = 0;
  for (int j = 0; j < kCount; ++j) {
    if (job.gain) squares += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    if (own) v[padded_index(i + j)] = x[j];
  }
  return squares;
}

// kTransform false: the short program of a decode step; a long one takes longer to fetch.
template <bool kTransform>
__global__ void __launch_bounds__(1024)
    rows_kernel(const __grid_constant__ RowsJob job, int chunk) {
  extern __shared__ float v[];  // columns [begin, end)
  const int64_t row = blockIdx.x, first = row * job.cols;
  const int cols = static_cast<int>(job.cols);
  const int begin = blockIdx.y * chunk, end = min(begin + chunk, cols);
  // No kernel writes these.
  const int first_col = begin + threadIdx.x;
  const float first_gain = job.gain && first_col < end ? job.gain[first_col] : 0.0f;
  if constexpr (kTransform) {
    for (int i = begin + threadIdx.x * 32; job.signs && i < end; i += blockDim.x * 32) {
      prefetch(job.signs + i);
    }
  }
  begin_kernel();
  const auto own = [&](int i) { return i >= begin && i < end; };
  // The norm needs the squares of all columns, also where several blocks share a row.
  const int load_begin = job.gain ? 0 : begin, load_end = job.gain ? cols : end;
  double squares = 0;
  if (cols % 4 == 0) {
#pragma unroll 4
    for (int i = load_begin + threadIdx.x * 4; i < load_end; i += blockDim.x * 4) {
      squares += load_elements<4>(job, first + i, i - begin, own(i), v);
    }
  } else {
    for (int i = load_begin + threadIdx.x; i < load_end; i += blockDim.x) {
      squares += load_elements<1>(job, first + i, i - begin, own(i), v);
    }
  }
  if (job.gain) {
    const double mean = block_sum(squares) / static_cast<double>(job.cols);
    const float factor = norm_factor(mean, job.eps);
    for (int i = first_col; i < end; i += blockDim.x) {
      const float gain = i == first_col ? first_gain : job.gain[i];
      const float x = v[padded_index(i - begin)] * factor * gain;
      if (job.normed) job.normed[first + i] = x;
      v[padded_index(i - begin)] = x;
    }
  }
  __syncthreads();
  if constexpr (kTransform) {
    if (chunk < cols) {  // a part of the row; base_kernel does the rest
      if (job.signs && !job.inverse) random_signs(job, begin, end, v);
      __syncthreads();
      butterflies(job, end - begin, v);
      for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {
        job.transformed[first + i] = v[padded_index(i - begin)];
      }
      return;
    }
    hadamard(job, v);
  }
  if (job.bits >= 16) return;
  round_row(job, row, begin, end, [&](int i) { return v[padded_index(i - begin)]; });
}

constexpr int kCluster = 8, kStretchesOfBlock = 4;

// The greatest of a cluster; every thread gets it. All of its blocks are there.
__device__ uint32_t cluster_max(uint32_t value) {
  value = block_max(value);
#if __CUDA_ARCH__ >= 900
  __shared__ uint32_t of_blocks[kCluster];
  if (threadIdx.x < kCluster) store_in_cluster(of_blocks + blockIdx.x, threadIdx.x, value);
  sync_cluster();
#pragma unroll
  for (int i = 0; i < kCluster; ++i) value = max(value, of_blocks[i]);
#endif
  return value;
}

// A row that nothing but loading comes before, shared out; a thread has four columns. kLevels:
// two-level scales; the row's blocks of threads are a cluster.
template <bool kLevels>
__global__ void __launch_bounds__(1024) stretch_kernel(const __grid_constant__ RowsJob job) {
  if constexpr (kLevels) arrive_at_cluster();  // no block's memory is written before it is there
  begin_kernel();
  const int64_t row = blockIdx.y;
  const int stretch = (blockIdx.x * blockDim.x + threadIdx.x) / kWarp;
  const int col = stretch * 128 + threadIdx.x % kWarp * 4;
  float x[1][4], unit = 0;
  load_columns(job, row, col, x);
  if constexpr (kLevels) {
    wait_for_cluster();
    const uint32_t largest = cluster_max(__float_as_uint(largest_of(x)));
    unit = level_unit(job, __uint_as_float(largest));
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      job.rounded.scales[scale_offset(job.rounded, row, 0)] = unit;
    }
  }
  round_stretches(job, row, stretch, unit, StretchPlace(job.rounded, row), x);
}

// Rows that are shared out. With two-level scales, shorter ones are rounded by the product that
// reads them (packed_matvec.cu), or soon enough by one block.
bool takes_stretches(const RowsJob& job, const Gpu& gpu) {
  if (job.rows > kMatvecRows || job.bits >= 16 || job.block > 0 || job.gain || job.expanded ||
      !whole_stretches(job) || job.cols % 128 != 0) {
    return false;
  }
  return job.level_group == 0 ||
         (gpu.facts.major >= 9 && job.cols > 4096 && job.cols <= kCluster * 4096);
}

void launch_stretches(const RowsJob& job, const Gpu& gpu) {
  const bool levels = job.level_group > 0;
  const int64_t n_stretches = job.cols / 128;
  const int64_t of_block = levels ? (n_stretches + kCluster - 1) / kCluster : kStretchesOfBlock;
  const int64_t n_blocks = levels ? kCluster : (n_stretches + of_block - 1) / of_block;
  launch_clusters(gpu, "rows", levels ? stretch_kernel<true> : stretch_kernel<false>,
                  dim3(static_cast<unsigned>(n_blocks), static_cast<unsigned>(job.rows)),
                  dim3(static_cast<unsigned>(of_block * kWarp)), 0, levels ? kCluster : 1, job);
}

constexpr int kPlaces = 128, kBaseWarps = 12;

// Few rows: the base matrix on kPlaces places of every part of a block, and the rounding of what
// comes out, whose stretches of 128 columns lie inside the parts.
template <int kM>
__global__ void __launch_bounds__(kBaseWarps* kWarp)
    base_kernel(const __grid_constant__ RowsJob job) {
  __shared__ float base[kM * kM], v[kM][kPlaces];
  load_base(job, base);
  begin_kernel();
  const int64_t row = blockIdx.x;
  const int block = static_cast<int>(job.block), inner = block / kM;
  const int stretches = inner / kPlaces;  // of a part
  const int first = blockIdx.y / stretches * block + blockIdx.y % stretches * kPlaces;
  float* at = job.transformed + row * job.cols + first;
  constexpr int kTurns = kBaseWarps * kWarp / kPlaces;  // threads of a place
  const int place = threadIdx.x % kPlaces, turn = threadIdx.x / kPlaces;
  float parts[kM];
#pragma unroll
  for (int i = 0; i < kM; ++i) parts[i] = at[i * inner + place];
  __syncthreads();  // everyone has read, base is there
  for (int to = turn; to < kM; to += kTurns) {
    const float sum = signed_sum<kM>(base + to * kM, parts) * job.hadamard_scale;
    const int col = first + to * inner + place;
    v[to][place] = job.signs && job.inverse && job.signs[col] < 0 ? -sum : sum;
    at[to * inner + place] = v[to][place];
  }
  if (job.bits >= 16) return;
  __syncthreads();
  for (int to = threadIdx.x / kWarp; to < kM; to += kBaseWarps) {
    const int begin = first + to * inner;
    round_stretch(job, row, begin / 128, 0.0f, [&](int col) { return v[to][col - begin]; });
  }
}

// Whether one row's transform is shared out over many blocks of threads: rows_kernel, then
// base_kernel.
bool transform_is_divided(const RowsJob& job) {
  const int64_t inner = job.block / std::max<int64_t>(job.base_order, 1);
  const int group = job.rounded.group;
  const bool rounds = job.bits < 16;
  return job.rows <= kMatvecRows && job.block > 0 && base_in_registers(job.base_order) &&
         inner % kPlaces == 0 && !job.gain &&
         (!rounds || group == 32 || group == 64 || group == 128);
}

}  // namespace

void launch_rows(const RowsJob& job, const Gpu& gpu) {
  TQ_CHECK(job.block == 0 || job.transformed, "a transformed row needs a place");
  if (job.rows == 0) return;
  if (job.rows > kMatvecRows && launch_many_rows(job, gpu)) return;
  if (takes_stretches(job, gpu)) return launch_stretches(job, gpu);
  // Few rows are latency: several blocks share one, where no block needs what another one writes.
  const bool whole_groups = job.bits >= 16 || job.rounded.group <= 128;
  const bool in_place = job.gain && (job.term || job.up || job.normed == job.x);
  const bool two_steps = transform_is_divided(job);
  const bool divided = job.rows <= kMatvecRows && job.block == 0 && whole_groups && !in_place &&
                       job.cols % kChunk == 0;
  const int chunk = static_cast<int>(two_steps ? job.block / job.base_order
                                     : divided ? kChunk
                                               : job.cols);
  const int64_t shared = padded_index(chunk) * 4 + 4;
  if (shared > gpu.facts.shared_bytes) {
    throw Error(ErrorKind::kResource, "row too long for this GPU", gpu.facts.name,
                std::to_string(job.cols) + " columns do not fit its shared memory");
  }
  // A thread for four elements that it loads. Many rows fill the device anyway.
  const int64_t loaded = job.gain ? job.cols : chunk;
  const int64_t threads =
      std::clamp<int64_t>((loaded + 127) / 128 * kWarp, kWarp, job.rows > 64 ? 256 : 1024);
  launch_kernel(
      gpu, "rows", job.block > 0 ? rows_kernel<true> : rows_kernel<false>,
      dim3(static_cast<unsigned>(job.rows), static_cast<unsigned>((job.cols + chunk - 1) / chunk)),
      dim3(static_cast<unsigned>(threads)), shared, job, chunk);
  if (!two_steps) return;
  const auto kernel = job.base_order == 12   ? base_kernel<12>
                      : job.base_order == 20 ? base_kernel<20>
                      : job.base_order == 28 ? base_kernel<28>
                                             : base_kernel<36>;
  const int64_t n_blocks = job.cols / job.base_order / kPlaces;
  launch_kernel(gpu, "rows", kernel,
                dim3(static_cast<unsigned>(job.rows), static_cast<unsigned>(n_blocks)),
                dim3(kBaseWarps * kWarp), 0, job);
}

}  // namespace tq::cuda
