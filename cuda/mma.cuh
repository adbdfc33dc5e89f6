// mma.cuh - the tensor-core instructions that the kernels use, and the unpacking of 4-bit codes.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace tq::cuda {

/// Four int32 accumulators of an mma m16n8: lane l holds rows l/4 and l/4 + 8 (elements 0, 1 and
/// 2, 3) and columns 2 (l % 4), 2 (l % 4) + 1.
struct IntTile {
  int at[4];
};

/// D = A B + C with A [16, 32] and B [32, 8] of s8. Lane l: A words are rows l/4, l/4 + 8, then the
/// same rows 16 columns further; B words are column l/4, rows 4 (l % 4).., then 16 further.
__device__ inline void mma_s8(IntTile& d, const uint32_t* a, uint32_t b0, uint32_t b1,
                              const IntTile& c) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=r"(d.at[0]), "=r"(d.at[1]), "=r"(d.at[2]), "=r"(d.at[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c.at[0]), "r"(c.at[1]),
        "r"(c.at[2]), "r"(c.at[3]));
}

/// D = A B + C with A [16, 64] and B [64, 8] of signed nibbles. Lane l: A words are rows l/4, l/4 +
/// 8 at columns 8 (l % 4).., then the same rows 32 columns further; B words column l/4, rows 8 (l %
/// 4).., then 32 further. Tensor cores before Hopper's have it, later ones imitate it.
__device__ inline void mma_s4(IntTile& d, const uint4& a, uint32_t b0, uint32_t b1,
                              const IntTile& c) {
  asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=r"(d.at[0]), "=r"(d.at[1]), "=r"(d.at[2]), "=r"(d.at[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(c.at[0]), "r"(c.at[1]),
        "r"(c.at[2]), "r"(c.at[3]));
}

/// Two f16, the lower one in the lower half: a word of the operands below.
__device__ inline uint32_t pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

/// Two floats as the sum of two such words: within 2^-22 of them, or 2^-25 below 2^-3.
__device__ inline void split_half(float first, float second, uint32_t& high, uint32_t& low) {
  high = pack_half(first, second);
  const float2 known = __half22float2(reinterpret_cast<const __half2&>(high));
  low = pack_half(first - known.x, second - known.y);
}

/// Weights of attention are multiplied by 2^15 on their way to f16: the smallest that matter are
/// then no subnormal numbers. What they are divided by is, too.
constexpr float kWeightShift = 15;

/// acc += A B with A [16, 16] and B [16, 8] of f16, f32 sums. Lane l: A words are rows l/4,
/// l/4 + 8 at columns 2 (l % 4).., then both 8 columns further; B words column l/4, rows 2 (l %
/// 4).., then 8 further; acc as in IntTile.
__device__ inline void mma_f16(float* acc, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// The same of bf16.
__device__ inline void mma_bf16(float* acc, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
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

/// What dots start from: with 1.5 * 2^23 added, the bits of a sum below 2^22 are those of the float
/// 1.5 * 2^23 + sum. Takes one addition back to a float, where a conversion is eight times slower.
__device__ inline IntTile dots_start() {
  return {{kRoundMagicBits, kRoundMagicBits, kRoundMagicBits, kRoundMagicBits}};
}

/// sums += dots * (scales of the lane's two rows) * (scales of its two columns).
__device__ inline void add_scaled(const IntTile& dots, float2 w, float2 x, float* sums) {
  const float by[4] = {w.x * x.x, w.x * x.y, w.y * x.x, w.y * x.y};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sums[i] = fmaf(__int_as_float(dots.at[i]) - kRoundMagic, by[i], sums[i]);
  }
}

/// Signed nibbles as bytes holding 16 * code: the low nibbles of a word, the high ones.
__device__ inline uint32_t low_nibbles(uint32_t word) {
  return word << 4 & 0xF0F0F0F0u;
}
__device__ inline uint32_t high_nibbles(uint32_t word) {
  return word & 0xF0F0F0F0u;
}

/// Bytes that hold signed nibbles, the first four and the next four, as a word of the weights holds
/// them (weights.h).
__device__ inline uint32_t pack_nibbles(uint32_t first, uint32_t next) {
  return (first & 0x0F0F0F0Fu) | (next & 0x0F0F0F0Fu) << 4;
}

/// Byte i of the result is byte (nibble i of pick) of low and high together; nibbles below 8.
/// (__byte_perm() masks them first.)
__device__ inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t pick) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(pick));
  return bytes;
}

/// Signed nibbles as e4m3 numbers, four in the order they stand: two tables of eight, one for each
/// sign, and a choice between them.
__device__ inline void nibbles_fp8(uint32_t word, uint32_t& first, uint32_t& second) {
  const auto convert = [](uint32_t magnitudes, uint32_t signs) {
    const uint32_t positive = pick_bytes(0x44403800u, 0x4E4C4A48u, magnitudes);  // 0..7
    const uint32_t negative = pick_bytes(0xCACCCED0u, 0xB8C0C4C8u, magnitudes);  // -8..-1
    return pick_bytes(positive, negative, signs);
  };
  const uint32_t magnitudes = word & 0x77777777u, signs = (word >> 1 & 0x44444444u) | 0x32103210u;
  first = convert(magnitudes, signs);
  second = convert(magnitudes >> 16, signs >> 16);
}

/// The A operand of 32 columns from the words of a lane's two rows: s8 16 * code, or e4m3.
template <bool kFp8>
__device__ inline void expand_codes(uint32_t row, uint32_t row_8, uint32_t (&a)[4]) {
  if constexpr (kFp8) {
    nibbles_fp8(row, a[0], a[2]);
    nibbles_fp8(row_8, a[1], a[3]);
  } else {
    a[0] = low_nibbles(row), a[1] = low_nibbles(row_8);
    a[2] = high_nibbles(row), a[3] = high_nibbles(row_8);
  }
}

/// The A operands of 2 x 32 columns from a lane's 16 bytes (weights.h, fragment order).
__device__ inline void expand_codes(const uint4& words, uint32_t (*a)[4]) {
  expand_codes<false>(words.x, words.y, a[0]);
  expand_codes<false>(words.z, words.w, a[1]);
}

}  // namespace tq::cuda
