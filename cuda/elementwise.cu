// elementwise - the operations without a reduction across a row, one thread an element or a pair:
// embedding rows, sums, factors of columns, SwiGLU, copies, rope angles.
//
// Memory    every input read once, every output written once -> DRAM
// Error     equal to cpu/ops.cpp but for exp (2 ulp); tests/test_cuda_ops.cpp
// Not here: what is done to whole rows before a product (rows.cu).
#include <algorithm>

#include "cuda/device.cuh"
#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int kThreads = 256;

dim3 grid_for(int64_t count) {
  return dim3(
      static_cast<unsigned>(std::clamp<int64_t>((count + kThreads - 1) / kThreads, 1, 1 << 16)));
}

// The elements of one thread: a grid-stride loop.
#define TQ_EACH(i, count)                                          \
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, \
               step_ = gridDim.x * int64_t{blockDim.x};            \
       i < (count); i += step_)

__global__ void embed_kernel(CanonicalView table, const StepInput* input, int64_t count, float* x) {
  begin_kernel();
  TQ_EACH(i, count) {
    x[i] = canonical_at(table, input->tokens[i / table.cols], i % table.cols);
  }
}

__global__ void add_kernel(float* x, const float* y, int64_t count) {
  begin_kernel();
  TQ_EACH(i, count) x[i] += y[i];
}

__global__ void scale_columns_kernel(float* x, const float* factors, int64_t cols, int64_t count) {
  begin_kernel();
  TQ_EACH(i, count) x[i] *= factors[i % cols];
}

__global__ void silu_mul_kernel(float* gate, const float* up, int64_t count) {
  begin_kernel();
  TQ_EACH(i, count) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

__global__ void copy_kernel(const float* from, float* to, int64_t count) {
  begin_kernel();
  TQ_EACH(i, count) to[i] = from[i];
}

__global__ void rope_angles_kernel(const float* inv_freq, int64_t half, float factor, int64_t n,
                                   float2* angles) {
  TQ_EACH(i, n * half) {
    const double angle = static_cast<double>(static_cast<float>(i / half) * inv_freq[i % half]);
    angles[i] = make_float2(static_cast<float>(cos(angle)) * factor,
                            static_cast<float>(sin(angle)) * factor);
  }
}

}  // namespace

void launch_embed(const CanonicalView& table, const StepInput* input, int64_t rows, float* x,
                  const Gpu& gpu) {
  const int64_t count = rows * table.cols;
  launch_kernel(gpu, "embed", embed_kernel, grid_for(count), dim3(kThreads), 0, table, input, count,
                x);
}

void launch_add(float* x, const float* y, int64_t count, const Gpu& gpu) {
  launch_kernel(gpu, "add", add_kernel, grid_for(count), dim3(kThreads), 0, x, y, count);
}

void launch_scale_columns(float* x, const float* factors, int64_t rows, int64_t cols,
                          const Gpu& gpu) {
  const int64_t count = rows * cols;
  launch_kernel(gpu, "scale_columns", scale_columns_kernel, grid_for(count), dim3(kThreads), 0, x,
                factors, cols, count);
}

void launch_silu_mul(float* gate, const float* up, int64_t count, const Gpu& gpu) {
  launch_kernel(gpu, "silu_mul", silu_mul_kernel, grid_for(count), dim3(kThreads), 0, gate, up,
                count);
}

void launch_copy(const float* from, float* to, int64_t count, const Gpu& gpu) {
  launch_kernel(gpu, "copy", copy_kernel, grid_for(count), dim3(kThreads), 0, from, to, count);
}

void launch_rope_angles(const float* inv_freq, int64_t half, float factor, int64_t n,
                        float2* angles, const Gpu& gpu) {
  rope_angles_kernel<<<grid_for(n * half), kThreads, 0, gpu.stream>>>(inv_freq, half, factor, n,
                                                                      angles);
  cuda_check(cudaGetLastError(), "rope angles");
}

}  // namespace tq::cuda
