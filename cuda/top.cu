// top - the few largest of a row of logits, so that decoding sends no more than the sampler reads.
//
// top - out[0, count) = the largest of x[0, n), largest first, the lower index first on ties
// Shapes    x [n] f32; keys [count] of 64 bits: the order of the number above, ~index below
// Work      a block 2048 numbers: runs of 2^m >= count are sorted (bitonic), then of two
//           neighbouring runs the larger half is kept and sorted, until one is left. Again with
//           what the blocks keep, until one block is left
// Memory    x once; 600 KB for a large vocabulary -> latency of two small kernels
// Constants 2048 numbers a block of 1024 threads: two stages up to count 27 at 150,000 numbers
// Requires  count <= kMaxTop
// Error     exact; what is not finite comes first, as NaN; -0 and 0 are ties.
// tests/test_cuda_ops.cpp
#include <algorithm>
#include <bit>

#include "cuda/device.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kThreads = 1024, kStretch = 2 * kThreads;

// Orders like (x, -index); above 0, which stands for nothing.
__device__ inline uint64_t key_of(float x, int64_t index) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 -> 0
  uint32_t order = bits >> 31 ? ~bits : bits | 0x80000000u;
  if (!isfinite(x)) order = 0xFFFFFFFFu;
  return uint64_t{order} << 32 | static_cast<uint32_t>(~index);
}
__device__ inline uint64_t load_key(const float* x, int64_t i) {
  return key_of(x[i], i);
}
__device__ inline uint64_t load_key(const uint64_t* keys, int64_t i) {
  return keys[i];
}

// One step of a bitonic sort of the first n keys: pairs `stride` apart, runs of `size` falling and
// rising in turn.
__device__ void exchange(uint64_t* keys, int n, int stride, int size) {
  const int thread = threadIdx.x;
  if (thread < n / 2) {
    const int low = thread & (stride - 1), i = (thread - low) * 2 + low;
    const uint64_t a = keys[i], b = keys[i + stride];
    const bool falling = (i & size) == 0;
    if ((a < b) == falling) keys[i] = b, keys[i + stride] = a;
  }
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    top_kernel(const T* x, int64_t n, int count, int run, uint64_t* out) {
  begin_kernel();
  __shared__ uint64_t keys[kStretch];
  const int64_t first = blockIdx.x * int64_t{kStretch};
  for (int i = threadIdx.x; i < kStretch; i += kThreads) {
    keys[i] = first + i < n ? load_key(x, first + i) : 0;
  }
  __syncthreads();
  for (int size = 2; size <= run; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) exchange(keys, kStretch, stride, size);
  }
  for (int left = kStretch / 2; left >= run; left /= 2) {
    // One run falls, the next one rises: the larger of each pair are the largest `run` of both.
    const int i = threadIdx.x, from = i / run * 2 * run + i % run;
    const uint64_t larger = i < left ? max(keys[from], keys[from + run]) : 0;
    __syncthreads();
    if (i < left) keys[i] = larger;
    __syncthreads();
    for (int stride = run / 2; stride > 0; stride /= 2) exchange(keys, left, stride, run);
  }
  if (threadIdx.x < count) out[blockIdx.x * int64_t{count} + threadIdx.x] = keys[threadIdx.x];
}

int64_t n_blocks(int64_t n) {
  return (n + kStretch - 1) / kStretch;
}

}  // namespace

int64_t top_scratch(int64_t n, int64_t count) {
  return 2 * n_blocks(n) * count;
}

void launch_top(const TopJob& job, const Gpu& gpu) {
  TQ_CHECK(job.count > 0 && job.count <= kMaxTop && job.n > 0 && job.n <= INT32_MAX);
  const int count = static_cast<int>(job.count);
  const int run = static_cast<int>(std::bit_ceil(static_cast<unsigned>(count)));
  int64_t blocks = n_blocks(job.n);
  uint64_t *to = job.scratch, *from = job.scratch + blocks * count;
  const auto grid = [&] { return dim3(static_cast<unsigned>(blocks)); };
  launch_kernel(gpu, "top", top_kernel<float>, grid(), dim3(kThreads), 0, job.x, job.n, count, run,
                blocks == 1 ? job.keys : to);
  while (blocks > 1) {
    std::swap(from, to);
    const int64_t n = blocks * count;
    blocks = n_blocks(n);
    launch_kernel(gpu, "top", top_kernel<uint64_t>, grid(), dim3(kThreads), 0, from, n, count, run,
                  blocks == 1 ? job.keys : to);
  }
}

}  // namespace tq::cuda
