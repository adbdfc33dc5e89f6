// many_rows - what rows.cu does to a row, for many rows of usual widths: a block of threads a row.
//
// norm_kernel - x' = round(rms_norm(silu(sum x + term) * up))
// transform_kernel - x' = round(H(silu(sum x + term) * up))   each part optional (kernels.h,
// RowsJob)
// Shapes    x, term, up [rows, cols] f32; codes [rows, padded_cols] s8, scales [group, row] f32
// Work      norm: the row stays in registers, 4 columns of each of 4 stretches a thread; all of it
//           is asked for before any is used. Transform: it stands in shared memory; 2 butterfly
//           stages while it is loaded, then 4 a pass, two columns side by side a thread; the base
//           matrix by additions, its signs are part of the program (paley.cuh). A warp rounds 4
//           stretches of 128 columns at a time
// Memory    each input read once, each wanted result written once -> DRAM
// Constants 16 bytes of padding after 128 and again after 1024 (wide_index): butterflies of radix
//           16 on pairs of columns, whatever the stage, meet no bank twice. 64 registers a thread,
//           so that four rows of 12288 columns are at work in a multiprocessor
// Requires  takes_norm(), takes_transform(); else rows.cu
// Error     as rows.cu
// Source    as rows.cu
// Measured  H100 (3.03 TB/s), 2048 rows, 2026-11-27, bench_cuda rows: round 4096 columns 17.5 us,
//           79 % of the bandwidth; norm and round 21.4 us, 65 %; sum, norm and round 41.7 us, 86 %;
//           SwiGLU, Hadamard and round 12288 columns 119 us, 63 %, 14336 columns 158 us, 55 %
#include <algorithm>
#include <type_traits>

#include "cuda/hadamard.cuh"
#include "cuda/paley.cuh"
#include "cuda/row_block.cuh"

namespace tq::cuda {
namespace {

constexpr int kStretches = 4;  // of a thread of a wide row

template <int kCount>
__global__ void __launch_bounds__(1024) norm_kernel(const __grid_constant__ RowsJob job) {
  begin_kernel();
  const int64_t row = blockIdx.x;
  const int stretch = threadIdx.x / kWarp * kCount;
  const int col = stretch * 128 + threadIdx.x % kWarp * 4;
  float x[kCount][4];
  load_columns(job, row, col, x);
  if (job.gain) {
    norm_columns(job, NormInput<kCount>(job, col), x);
    if (job.normed) store_columns(job, row, col, x, job.normed);
  }
  if (job.bits >= 16) return;
  const float largest = needs_largest(job) ? largest_of(x) : 0.0f;
  round_block<kCount>(job, row, largest, [&](const auto& work) { work(stretch, x); });
}

// Where column i of a row stands in shared memory; linear in i's bits, and columns 4 n to 4 n + 3
// are neighbours.
__host__ __device__ constexpr int wide_index(int i) {
  return i + 4 * ((i >> 5) + (i >> 8));
}

// kRadix = 2^n: n butterfly stages, strides 2^kLogHalf, twice that, ..., on all of the row.
template <int kRadix, int kLogHalf>
__device__ void wide_pass(float* v, int cols) {
  constexpr int kHalf = 1 << kLogHalf;
  for (int item = threadIdx.x; item < cols / (2 * kRadix); item += blockDim.x) {
    const int first = (item >> (kLogHalf - 1) << kLogHalf) * kRadix + (item & (kHalf / 2 - 1)) * 2;
    float* at = v + wide_index(first);
    float left[kRadix], right[kRadix];
#pragma unroll
    for (int i = 0; i < kRadix; ++i) {
      const float2 pair = *reinterpret_cast<const float2*>(at + wide_index(i * kHalf));
      left[i] = pair.x;
      right[i] = pair.y;
    }
    butterfly_stages(left);
    butterfly_stages(right);
#pragma unroll
    for (int i = 0; i < kRadix; ++i) {
      *reinterpret_cast<float2*>(at + wide_index(i * kHalf)) = make_float2(left[i], right[i]);
    }
  }
  __syncthreads();
}

constexpr int kMaxLogInner = 14;

// Stages kLogHalf and up of butterflies of 2^log_inner columns.
template <int kLogHalf>
__device__ void wide_passes(float* v, int cols, int log_inner) {
  switch (log_inner - kLogHalf) {
    case 0:
      break;
    case 1:
      wide_pass<2, kLogHalf>(v, cols);
      break;
    case 2:
      wide_pass<4, kLogHalf>(v, cols);
      break;
    case 3:
      wide_pass<8, kLogHalf>(v, cols);
      break;
    default:
      wide_pass<16, kLogHalf>(v, cols);
      if constexpr (kLogHalf + 4 < kMaxLogInner) wide_passes<kLogHalf + 4>(v, cols, log_inner);
  }
}
// The last step; a part is a multiple of 256 columns. Element i of each of kM parts becomes a
// signed sum of the elements at its place. Returns the greatest magnitude of the results.
template <int kM>
__device__ float wide_base_stage(const RowsJob& job, float* v, int log_inner) {
  constexpr PaleySigns<kM> kSigns;
  constexpr int kWidth = kM == 1 ? 4 : kM == 12 ? 2 : 1;  // places side by side
  struct alignas(4 * kWidth) Vector {
    float x[kWidth];
  };
  const int n_places = static_cast<int>(job.cols) / kM;
  const int part_step = wide_index(1 << log_inner);
  float largest = 0;
  for (int place = threadIdx.x * kWidth; place < n_places; place += blockDim.x * kWidth) {
    const int block = place >> log_inner, inner_place = place & ((1 << log_inner) - 1);
    float* at = v + wide_index(inner_place) + block * kM * part_step;
    const auto part = [&](int i) -> Vector& {
      return *reinterpret_cast<Vector*>(at + i * part_step);
    };
    Vector parts[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) parts[i] = part(i);
#pragma unroll
    for (int to = 0; to < kM; ++to) {
      Vector sum;
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        sum.x[w] = kSigns.row[0] >> to & 1 ? -parts[0].x[w] : parts[0].x[w];
#pragma unroll
        for (int from = 1; from < kM; ++from) {
          const float term = parts[from].x[w];
          sum.x[w] = kSigns.row[from] >> to & 1 ? sum.x[w] - term : sum.x[w] + term;
        }
        sum.x[w] *= job.hadamard_scale;
        largest = max_or_nan(largest, fabsf(sum.x[w]));
      }
      part(to) = sum;
    }
  }
  __syncthreads();
  return largest;
}

template <int kM>
__global__ void __launch_bounds__(kM < 28 ? 512 : 384, 2)
    transform_kernel(const __grid_constant__ RowsJob job) {
  extern __shared__ float4 shared[];
  float* v = reinterpret_cast<float*>(shared);
  begin_kernel();
  const int64_t row = blockIdx.x;
  const int cols = static_cast<int>(job.cols), lane = threadIdx.x % kWarp;
  const int first_stretch = threadIdx.x / kWarp * kStretches;
  const int stretch_step = blockDim.x / kWarp * kStretches;
  for (int stretch = first_stretch; stretch * 128 < cols; stretch += stretch_step) {
    const int begin = stretch * 128 + lane * 4;
    float x[kStretches][4];
    load_columns(job, row, begin, x);
#pragma unroll
    for (int s = 0; s < kStretches; ++s) {
      const int col = begin + s * 128;
      if (col >= cols) continue;
      if (job.signs) {
        const char4 signs = *reinterpret_cast<const char4*>(job.signs + col);
        x[s][0] = signs.x < 0 ? -x[s][0] : x[s][0];
        x[s][1] = signs.y < 0 ? -x[s][1] : x[s][1];
        x[s][2] = signs.z < 0 ? -x[s][2] : x[s][2];
        x[s][3] = signs.w < 0 ? -x[s][3] : x[s][3];
      }
      butterfly_stages(x[s]);
      *reinterpret_cast<float4*>(v + wide_index(col)) =
          make_float4(x[s][0], x[s][1], x[s][2], x[s][3]);
    }
  }
  __syncthreads();
  const int log_inner = 31 - __clz(static_cast<int>(job.block) / kM);
  wide_passes<2>(v, cols, log_inner);
  const float largest = wide_base_stage<kM>(job, v, log_inner);
  const auto batches = [&](const auto& work) {
    for (int stretch = first_stretch; stretch * 128 < cols; stretch += stretch_step) {
      float x[kStretches][4];
#pragma unroll
      for (int s = 0; s < kStretches; ++s) {
        const int col = (stretch + s) * 128 + lane * 4;
        float4 values = make_float4(0, 0, 0, 0);
        if (col < cols) values = *reinterpret_cast<const float4*>(v + wide_index(col));
        x[s][0] = values.x, x[s][1] = values.y, x[s][2] = values.z, x[s][3] = values.w;
      }
      work(stretch, x);
    }
  };
  if (job.keep_transformed) {
    batches([&](int stretch, const float(&x)[kStretches][4]) {
      store_columns(job, row, stretch * 128 + lane * 4, x, job.transformed);
    });
  }
  if (job.bits < 16) round_block<kStretches>(job, row, largest, batches);
}

bool rounds_by_stretches(const RowsJob& job) {
  const int64_t group = job.level_group > 0 ? job.level_group : job.rounded.group;
  return job.bits >= 16 || whole_stretches(job) || group >= job.cols;
}

bool takes_norm(const RowsJob& job) {
  return job.block == 0 && job.cols % 4 == 0 && job.cols <= 1024 * 4 * kStretches &&
         rounds_by_stretches(job);
}

int64_t transform_bytes(const RowsJob& job) {
  return wide_index(static_cast<int>(job.cols)) * 4;
}

bool takes_transform(const RowsJob& job, const Gpu& gpu) {
  if (job.block == 0 || job.gain || job.inverse || job.cols % 128 != 0) return false;
  if (job.base_order != 1 && !base_in_registers(job.base_order)) return false;
  const int64_t inner = job.block / job.base_order;
  return inner >= 256 && inner <= 1 << kMaxLogInner && rounds_by_stretches(job) &&
         transform_bytes(job) <= gpu.facts.shared_bytes;
}

}  // namespace

bool launch_many_rows(const RowsJob& job, const Gpu& gpu) {
  const dim3 grid(static_cast<unsigned>(job.rows));
  const auto threads = [&](int64_t columns, int64_t most) {
    const int64_t warps = (job.cols + columns * kWarp - 1) / (columns * kWarp);
    return dim3(static_cast<unsigned>(std::min(warps * kWarp, most)));
  };
  if (takes_norm(job)) {
    // As many threads as the device holds at once: a row in more hands is a row done sooner.
    const bool narrow = job.cols <= 1024 || (job.cols <= 4096 && job.rows <= 2 * gpu.facts.n_sms);
    if (narrow) {
      launch_kernel(gpu, "rows", norm_kernel<1>, grid, threads(4, 1024), 0, job);
    } else {
      launch_kernel(gpu, "rows", norm_kernel<kStretches>, grid, threads(4 * kStretches, 1024), 0,
                    job);
    }
    return true;
  }
  if (!takes_transform(job, gpu)) return false;
  const auto kernel = job.base_order == 1    ? transform_kernel<1>
                      : job.base_order == 12 ? transform_kernel<12>
                      : job.base_order == 20 ? transform_kernel<20>
                      : job.base_order == 28 ? transform_kernel<28>
                                             : transform_kernel<36>;
  // A row in more hands where the multiprocessors have no other rows.
  const bool alone = job.rows <= 2 * gpu.facts.n_sms || job.cols > 16384;
  launch_kernel(gpu, "rows", kernel, grid,
                threads(16, !alone                ? 256
                            : job.base_order < 28 ? 512
                                                  : 384),
                transform_bytes(job), job);
  return true;
}

}  // namespace tq::cuda
