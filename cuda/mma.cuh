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

/// Signed nibbles as bytes holding 16 * code: the low nibbles of a word, the high ones.
__device__ inline uint32_t low_nibbles(uint32_t word) {
  return word << 4 & 0xF0F0F0F0u;
}
__device__ inline uint32_t high_nibbles(uint32_t word) {
  return word & 0xF0F0F0F0u;
}

}  // namespace tq::cuda
