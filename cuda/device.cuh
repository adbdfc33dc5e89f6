// device.cuh - small device functions that several kernels share: warp sums, code positions, number
// formats, exact rounding.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "cuda/kernels.h"

namespace tq::cuda {

constexpr unsigned kFullMask = 0xFFFFFFFFu;
constexpr int kWarp = 32;

// Adding and subtracting 1.5 * 2^23 rounds |x| < 2^22 to an integer, ties to even.
constexpr float kRoundMagic = 12582912.0f;
constexpr int kRoundMagicBits = 0x4B400000;
constexpr float kLog2E = 1.4426950408889634f;

/// Byte of the code of (row, col).
/// kLanes: rows one after the other; inside 64 columns the 8-byte words 0..7 go to 0 2 4 6 1 3 5 7,
/// so that the 16 bytes that a lane feeds to two mma m16n8k32 are neighbours.
/// kTiles: tiles of 128 rows x 128 columns, row after row; of 32 columns the first half of each
/// 8 goes before all second halves, as the nibbles of the weights do (weights.h); 16-byte words of
/// a row are swizzled as wgmma reads them. kTilesFp8: the same, but of 8 columns 0 4 1 5 come
/// first.
__device__ inline int64_t code_offset(const RoundedRows& x, int64_t row, int64_t col) {
  const int64_t word = col >> 3 & 7;
  if (x.order == CodeOrder::kLanes) {
    return row * x.padded_cols +
           ((col & ~int64_t{63}) | (word < 4 ? 2 * word : 2 * word - 7) << 3 | (col & 7));
  }
  int64_t at = col & 7;
  if (x.order == CodeOrder::kTilesFp8) at = at < 4 ? 2 * at : 2 * at - 7;
  const int64_t chunk = (col >> 4 & 6) | at >> 2;  // of 16 bytes: two for 32 columns
  return (row / kRowStep * (x.padded_cols / kBlockCols) + col / kBlockCols) *
             (kRowStep * kBlockCols) +
         row % kRowStep * kBlockCols + (chunk ^ (row & 7)) * 16 + (word & 3) * 4 + (at & 3);
}

/// Index of the scale of a row's group.
__device__ inline int64_t scale_offset(const RoundedRows& x, int64_t row, int64_t group) {
  if (x.order == CodeOrder::kLanes) return group * kMatvecRows + row;
  return (row / kRowStep * x.n_groups + group) * kRowStep + row % kRowStep;
}

/// Where a lane finds the codes and the scales of a panel; + kSetCodes a block of 128 columns,
/// + kSetScales a group.
constexpr int kSetCodes = kSetPanels * 2 * kWarp, kSetScales = kSetPanels * 8;
__device__ inline const uint4* panel_codes(const FragmentView& w, int64_t panel) {
  return w.codes + panel / kSetPanels * (w.padded_cols / kBlockCols) * kSetCodes +
         panel % kSetPanels * 2 * kWarp;
}
__device__ inline const __half2* panel_scales(const FragmentView& w, int64_t panel) {
  return w.scales + panel / kSetPanels * w.n_groups * kSetScales + panel % kSetPanels * 8;
}

/// A small whole number as the byte that stands for it.
__device__ inline uint8_t code_byte(CodeOrder order, float code) {
  return order == CodeOrder::kTilesFp8
             ? __nv_cvt_float_to_fp8(code, __NV_SATFINITE, __NV_E4M3)
             : static_cast<uint8_t>(static_cast<int8_t>(static_cast<int>(code)));
}
__device__ inline int code_at(const RoundedRows& x, int64_t row, int64_t col) {
  const uint8_t byte = x.codes[code_offset(x, row, col)];
  return x.order == CodeOrder::kTilesFp8
             ? static_cast<int>(__half2float(__half(__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3))))
             : static_cast<int8_t>(byte);
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

/// 1 / sqrt(mean + eps), the factor of a norm; of a double, whose error is lost in the float.
__device__ inline float norm_factor(double mean, float eps) {
  return static_cast<float>(rsqrt(mean + static_cast<double>(eps)));
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

/// One output of a packed linear. For the stream, which nobody else adds to, the thread does not
/// wait.
__device__ inline void store_output(const PackedSegment& segment, int64_t token, int64_t row,
                                    float value) {
  const int64_t at = token * segment.w.rows + row;
  if (segment.accumulate) value += segment.y[at];
  if (segment.y) segment.y[at] = value;
  if (segment.stream) atomicAdd(segment.stream + at, value);
}

/// Asks for the 128 bytes around `at` to be in the second-level cache soon.
__device__ inline void prefetch(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

/// Waits for the kernel before: everything that an earlier one wrote may be read from here on. What
/// no kernel writes (weights) may be read before.
__device__ inline void await_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
/// Lets the next kernel of the stream be placed.
__device__ inline void place_next_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
/// Both, in this order: were the next kernel placed sooner, kernels further on would read their
/// weights while this one needs the memory.
__device__ inline void begin_kernel() {
  await_kernel();
  place_next_kernel();
}

/// Barrier of a cluster of blocks of threads, in two halves: what is written before the first half
/// is seen behind the second.
__device__ inline void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ inline void sync_cluster() {
  arrive_at_cluster();
  wait_for_cluster();
}
/// Where block `rank` of the cluster has in its shared memory what stands at `at` in this one's.
__device__ inline uint32_t address_in_cluster(const void* at, int rank) {
  uint32_t there = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(at))), "r"(rank));
#endif
  return there;
}
/// Four bytes to there.
template <typename T>
__device__ void store_in_cluster(T* at, int rank, T value) {
  static_assert(sizeof(T) == 4);
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address_in_cluster(at, rank)),
               "r"(reinterpret_cast<const uint32_t&>(value))
               : "memory");
#endif
}
/// Four bytes from there.
template <typename T>
__device__ T load_from_cluster(const T* at, int rank) {
  static_assert(sizeof(T) == 4);
  T value = {};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.u32 %0, [%1];"
               : "=r"(reinterpret_cast<uint32_t&>(value))
               : "r"(address_in_cluster(at, rank))
               : "memory");
#endif
  return value;
}
/// Sixteen bytes from there.
__device__ inline int4 load_four_from_cluster(const int32_t* at, int rank) {
  int4 value = {};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address_in_cluster(at, rank))
               : "memory");
#endif
  return value;
}

/// Launches `kernel`. From compute capability 9.0 on, its blocks may be placed before the kernel
/// ahead of it has ended (begin_kernel() waits): saves most of the gap between small kernels.
/// cluster: how many neighbouring blocks share a cluster.
template <typename... Params, typename... Args>
void launch_clusters(const Gpu& gpu, const char* name, void (*kernel)(Params...), dim3 grid,
                     dim3 block, int64_t shared_bytes, unsigned cluster, const Args&... args) {
  // 48 KB need no leave, but a kernel's own arrays count too.
  if (shared_bytes > 24 << 10) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               name);
  }
  if (cluster > 8) {  // more than every GPU with clusters has
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
               name);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = gpu.stream;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = gpu.facts.major < 9 ? 0 : cluster > 1 ? 2 : 1;
  cuda_check(cudaLaunchKernelEx(&config, kernel, Params(args)...), name);
}
template <typename... Params, typename... Args>
void launch_kernel(const Gpu& gpu, const char* name, void (*kernel)(Params...), dim3 grid,
                   dim3 block, int64_t shared_bytes, const Args&... args) {
  launch_clusters(gpu, name, kernel, grid, block, shared_bytes, 1, args...);
}

}  // namespace tq::cuda
