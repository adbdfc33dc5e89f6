// hadamard.cuh - online Hadamard transforms of rows in shared memory, for a block of threads.
//
// Butterflies of radix 8, then the base matrix of an order that is no power of two, in the CPU's
// order of operations: the same bits. Rows stand in shared memory with one float of padding after
// 32 (padded_index), so that the butterflies of neighbouring elements meet no bank twice.
#pragma once

#include "cuda/device.cuh"

namespace tq::cuda {

__host__ __device__ constexpr int padded_index(int i) {
  return i + (i >> 5);
}

// log2(kRadix) stages on kRadix elements.
template <int kRadix>
__device__ inline void butterfly_stages(float (&part)[kRadix]) {
#pragma unroll
  for (int stage = 1; stage < kRadix; stage *= 2) {
#pragma unroll
    for (int i = 0; i < kRadix; ++i) {
      if (i & stage) continue;
      const float a = part[i], b = part[i + stage];
      part[i] = a + b;
      part[i + stage] = a - b;
    }
  }
}

// kRadix = 2^n: n butterfly stages, strides 2^log_half, twice that, ..., on all of the row.
template <int kRadix>
__device__ void butterfly_pass(float* v, int count, int log_half) {
  const int half = 1 << log_half;
  for (int item = threadIdx.x; item < count / kRadix; item += blockDim.x) {
    const int first = (item >> log_half << log_half) * kRadix + (item & (half - 1));
    float part[kRadix];
#pragma unroll
    for (int i = 0; i < kRadix; ++i) part[i] = v[padded_index(first + i * half)];
    butterfly_stages(part);
#pragma unroll
    for (int i = 0; i < kRadix; ++i) v[padded_index(first + i * half)] = part[i];
  }
  __syncthreads();
}

// One row of the base matrix times the m elements at one place.
template <int kM>
__device__ inline float signed_sum(const float* base_row, const float (&parts)[kM]) {
  float sum = base_row[0] * parts[0];
#pragma unroll
  for (int i = 1; i < kM; ++i) sum = fmaf(base_row[i], parts[i], sum);
  return sum;
}

// The last step of a transform in place: element i of each of the m parts of a block becomes a
// signed sum of the m elements at the same place. kM = m: they are in registers; 0: any m, from `v`
// to `to`.
template <int kM>
__device__ void base_stage(const RowsJob& job, float* v, const float* base) {
  const int inner = static_cast<int>(job.block) / kM;
  const int n_places = static_cast<int>(job.cols) / kM;
  for (int place = threadIdx.x; place < n_places; place += blockDim.x) {
    const int first = place / inner * static_cast<int>(job.block) + place % inner;
    float parts[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) parts[i] = v[padded_index(first + i * inner)];
#pragma unroll 4
    for (int row = 0; row < kM; ++row) {
      v[padded_index(first + row * inner)] = signed_sum<kM>(base + row * kM, parts);
    }
  }
  __syncthreads();
}
template <>
__device__ inline void base_stage<0>(const RowsJob& job, float* v, const float*) {
  const int m = static_cast<int>(job.base_order), block = static_cast<int>(job.block);
  const int inner = block / m, step = job.inverse ? 1 : m;
  float* to = job.transformed + blockIdx.x * job.cols;
  for (int i = threadIdx.x; i < job.cols; i += blockDim.x) {
    const int first = i / block * block, row = (i - first) / inner, place = (i - first) % inner;
    const int8_t* signs = job.base + (job.inverse ? row * m : row);
    float sum = 0;
    for (int from = 0; from < m; ++from) {
      const float term = v[padded_index(first + from * inner + place)];
      const float signed_term = signs[from * step] < 0 ? -term : term;
      sum = from == 0 ? signed_term : sum + signed_term;
    }
    to[i] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < job.cols; i += blockDim.x) v[padded_index(i)] = to[i];
  __syncthreads();
}

constexpr int kMaxBase = 36;  // largest base matrix that stands in shared memory
__host__ __device__ constexpr bool base_in_registers(int64_t m) {
  return m == 12 || m == 20 || m == 28 || m == 36;
}

// The base matrix in the order that base_stage<m> sums: base[row * m + from].
__device__ inline void load_base(const RowsJob& job, float* base) {
  const int m = static_cast<int>(job.base_order);
  for (int i = threadIdx.x; i < m * m; i += blockDim.x) {
    base[i] = job.base[job.inverse ? i : i % m * m + i / m];
  }
}

__device__ inline void random_signs(const RowsJob& job, int begin, int end, float* v) {
  for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {
    if (job.signs[i] < 0) v[padded_index(i - begin)] = -v[padded_index(i - begin)];
  }
}

// All butterflies of columns [begin, end) in shared memory. They never leave a part of 2^k
// elements, and those tile the row.
__device__ inline void butterflies(const RowsJob& job, int count, float* v) {
  const int log_inner = 31 - __clz(static_cast<int>(job.block) / static_cast<int>(job.base_order));
  int log_half = 0;
  for (; log_half + 3 <= log_inner; log_half += 3) butterfly_pass<8>(v, count, log_half);
  if (log_half + 2 == log_inner) {
    butterfly_pass<4>(v, count, log_half);
  } else if (log_half + 1 == log_inner) {
    butterfly_pass<2>(v, count, log_half);
  }
}

// The row in shared memory, transformed in place; a copy goes to job.transformed.
__device__ inline void hadamard(const RowsJob& job, float* v) {
  const int cols = static_cast<int>(job.cols), m = static_cast<int>(job.base_order);
  __shared__ float base[kMaxBase * kMaxBase];
  if (base_in_registers(m)) load_base(job, base);
  if (job.signs && !job.inverse) random_signs(job, 0, cols, v);
  __syncthreads();
  butterflies(job, cols, v);
  switch (m) {
    case 1:
      break;
    case 12:
      base_stage<12>(job, v, base);
      break;
    case 20:
      base_stage<20>(job, v, base);
      break;
    case 28:
      base_stage<28>(job, v, base);
      break;
    case 36:
      base_stage<36>(job, v, base);
      break;
    default:
      base_stage<0>(job, v, base);
  }
  float* to = job.transformed + blockIdx.x * job.cols;
  for (int i = threadIdx.x; i < cols; i += blockDim.x) {
    const float x = v[padded_index(i)] * job.hadamard_scale;
    v[padded_index(i)] = job.signs && job.inverse && job.signs[i] < 0 ? -x : x;
    if (job.keep_transformed) to[i] = v[padded_index(i)];
  }
  __syncthreads();
}

}  // namespace tq::cuda
