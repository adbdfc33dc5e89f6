// device.cuh - small device functions that several kernels share: warp sums, code positions, number
// formats, exact rounding.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/kernels.h"

namespace tq::cuda {

constexpr unsigned kFullMask = 0xFFFFFFFFu;
constexpr int kWarp = 32;

// Adding and subtracting 1.5 * 2^23 rounds |x| < 2^22 to an integer, ties to even.
constexpr float kRoundMagic = 12582912.0f;
constexpr int kRoundMagicBits = 0x4B400000;

/// Where the code of a column stands in a row: inside 64 columns the 8-byte words 0..7 go to
/// 0 2 4 6 1 3 5 7, so that the 16 bytes that a lane feeds to two mma m16n8k32 are neighbours.
__host__ __device__ inline int64_t code_position(int64_t col) {
  const int64_t word = col >> 3 & 7;
  return (col & ~int64_t{63}) | (word < 4 ? 2 * word : 2 * word - 7) << 3 | (col & 7);
}

/// A whole number below 2^23 as a float; a conversion instruction takes eight times as long.
__device__ inline float small_float(uint32_t value) {
  return __uint_as_float(value | 0x4B000000u) - 8388608.0f;
}

template <typename T>
__device__ inline T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullMask, value, step);
  return value;
}
__device__ inline float warp_max(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullMask, value, step));
  }
  return value;
}

/// One element of a matrix in the file's layout.
__device__ inline float canonical_at(const CanonicalView& w, int64_t row, int64_t col) {
  const uint8_t* data = w.data + row * w.row_bytes;
  switch (w.storage) {
    case Storage::kF32:
      return reinterpret_cast<const float*>(data)[col];
    case Storage::kF16:
      return __half2float(reinterpret_cast<const __half*>(data)[col]);
    case Storage::kBF16:
      return __uint_as_float(uint32_t{reinterpret_cast<const uint16_t*>(data)[col]} << 16);
    case Storage::kQ4: {
      const int byte = data[col / 2];
      const int code = (col % 2 ? byte >> 4 : byte & 15) - 8;
      return __half2float(w.scales[row * w.n_groups + col / w.group]) * static_cast<float>(code);
    }
    case Storage::kQ8:
      return __half2float(w.scales[row * w.n_groups + col / w.group]) *
             static_cast<float>(reinterpret_cast<const int8_t*>(data)[col]);
  }
  return 0;
}

/// One output of a packed linear.
__device__ inline void store_output(const PackedSegment& segment, int64_t token, int64_t row,
                                    float value) {
  const int64_t at = token * segment.w.rows + row;
  if (segment.accumulate) value += segment.y[at];
  segment.y[at] = value;
  if (segment.stream) segment.stream[at] += value;
}

/// Lets the next kernel of the stream be placed while this one runs, and waits for the one before:
/// everything that an earlier kernel wrote may be read from here on. What no kernel writes
/// (weights) may be read before.
__device__ inline void begin_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
}

/// Launches `kernel`. From compute capability 9.0 on, its blocks may be placed before the kernel
/// ahead of it has ended (begin_kernel() waits): saves most of the gap between small kernels.
template <typename... Params, typename... Args>
void launch_kernel(const Gpu& gpu, const char* name, void (*kernel)(Params...), dim3 grid,
                   dim3 block, int64_t shared_bytes, const Args&... args) {
  if (shared_bytes > 48 << 10) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               name);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = gpu.stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = gpu.facts.major >= 9 ? 1 : 0;
  cuda_check(cudaLaunchKernelEx(&config, kernel, Params(args)...), name);
}

}  // namespace tq::cuda
