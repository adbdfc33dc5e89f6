// mma.cuh - the tensor-core instructions that the kernels use, and the unpacking of 4-bit codes.
#pragma once

#include <cstdint>

namespace tq::cuda {

/// Four int32 accumulators of an mma m16n8: lane l holds rows l/4 and l/4 + 8 (elements 0, 1 and
/// 2, 3) and columns 2 (l % 4), 2 (l % 4) + 1.
struct IntTile {
  int at[4];
};

/// acc += A B with A [16, 32] and B [32, 8] of s8. Lane l: A words are rows l/4, l/4 + 8, then the
/// same rows 16 columns further; B words are column l/4, rows 4 (l % 4).., then 16 further.
__device__ inline void mma_s8(IntTile& acc, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                              uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(acc.at[0]), "+r"(acc.at[1]), "+r"(acc.at[2]), "+r"(acc.at[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// acc += A B with A [16, 16] and B [16, 8] of f16, f32 sums. Lane l: A words are rows l/4,
/// l/4 + 8 at columns 2 (l % 4).., then both 8 columns further; B words column l/4, rows 2 (l %
/// 4).., then 8 further; acc as in IntTile.
__device__ inline void mma_f16(float* acc, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Four 8 x 8 matrices of 16-bit elements from shared memory: lanes 8i..8i+7 give the addresses of
/// the rows of matrix i; lane l gets elements 2 (l % 4) and the next of row l/4 of each
/// (transposed: of column l/4).
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t* to, const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
  }
}

/// 16 bytes from device to shared memory, in the background; commit() closes a batch, wait_for<n>()
/// waits until at most n batches are under way.
__device__ inline void copy_async(void* to, const void* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ inline void commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ inline void wait_for() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Signed nibbles as bytes holding 16 * code: the low nibbles of a word, the high ones.
__device__ inline uint32_t low_nibbles(uint32_t word) {
  return word << 4 & 0xF0F0F0F0u;
}
__device__ inline uint32_t high_nibbles(uint32_t word) {
  return word & 0xF0F0F0F0u;
}

}  // namespace tq::cuda
