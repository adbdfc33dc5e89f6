// lanes_avx512 - sixteen floats in one AVX-512 register. Included by *_avx512.cpp files only.
//
// The vocabulary in which lane_kernels.h is written; lanes_avx2.h is the same on two registers.
// Everything is internal to the including file, so that the linker never shares it with code built
// for other processors.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"

namespace tq {
namespace {

struct Lanes {
  __m512 v;

  // Registers for accumulators: rows x tokens of the dense kernel, vectors of the attention kernel.
  static constexpr int kDenseRows = 4, kDenseTokens = 6, kWide = 4;

  static Lanes zero() { return {_mm512_setzero_ps()}; }
  static Lanes set(float value) { return {_mm512_set1_ps(value)}; }
  static Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Lanes load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
  static Lanes load_f16(const void* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
  }
  static Lanes load_f16_first(const void* p, int64_t n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p))};
  }
  static Lanes load_bf16(const void* p) {
    return from_bf16(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  static Lanes load_bf16_first(const void* p, int64_t n) {
    return from_bf16(_mm256_maskz_loadu_epi16(mask(n), p));
  }
  /// 16 codes of 4 bits (stored as code + 8) or of 8 bits.
  static Lanes load_codes4(const void* p) {
    const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
    const __m128i nibble = _mm_set1_epi8(15);
    const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(bytes, nibble),
                                            _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble));
    return {
        _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(codes), _mm512_set1_epi32(8)))};
  }
  static Lanes load_codes8(const void* p) {
    return {
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))))};
  }
  /// 16 bytes as integers 0..255; their low or their high nibbles as 0..15.
  static Lanes load_u8(const void* p) {
    return {
        _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))))};
  }
  static Lanes load_nibbles(const void* p, bool high) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    const __m512i nibbles = high ? _mm512_srli_epi32(bytes, 4) : bytes;
    return {_mm512_cvtepi32_ps(_mm512_and_si512(nibbles, _mm512_set1_epi32(15)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_first(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  void store_f16_first(uint16_t* p, int64_t n) const {
    _mm256_mask_storeu_epi16(p, mask(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  /// Rounded to integers, ties to even; -128 <= value <= 127.
  void store_codes_first(int8_t* p, int64_t n) const {
    _mm_mask_storeu_epi8(p, mask(n), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }

  static Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
  /// b where a is NaN.
  static Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
  /// a < b ? yes : no, and no where either is NaN.
  static Lanes select_less(Lanes a, Lanes b, Lanes yes, Lanes no) {
    return {_mm512_mask_mov_ps(no.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), yes.v)};
  }
  /// value * 2^n where the low bits of `shifted` hold n.
  static Lanes scale_by_low_bits(Lanes value, Lanes shifted) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value.v), exponent))};
  }
  /// The first n lanes, `rest` in the others.
  static Lanes keep_first(Lanes value, int64_t n, Lanes rest) {
    return {_mm512_mask_mov_ps(rest.v, mask(n), value.v)};
  }
  /// Largest |x| by bit pattern: NaN above infinity.
  static Lanes max_magnitude(Lanes a, Lanes b) {
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(b.v), _mm512_set1_epi32(0x7FFFFFFF));
    return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), bits))};
  }
  float max_of_magnitudes() const {
    const int bits = _mm512_reduce_max_epi32(_mm512_castps_si512(v));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
  }
  float max_of_lanes() const { return _mm512_reduce_max_ps(v); }
  /// The tree of sum_lanes() in ops.h.
  float sum() const {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  /// sum() of kDenseRows vectors into consecutive floats: three additions serve all four.
  static void store_sums(const Lanes* a, bool accumulate, float* out) {
    const __m512 ab = add_halves(a[0].v, a[1].v), cd = add_halves(a[2].v, a[3].v);
    const __m512 four =
        _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
    const __m512 two = _mm512_add_ps(four, _mm512_shuffle_ps(four, four, 0x4E));
    const __m512 one = _mm512_add_ps(two, _mm512_shuffle_ps(two, two, 0xB1));
    const __m512i first_of_each = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
    __m128 sums = _mm512_castps512_ps128(_mm512_permutexvar_ps(first_of_each, one));
    if (accumulate) sums = _mm_add_ps(_mm_loadu_ps(out), sums);
    _mm_storeu_ps(out, sums);
  }
  /// Butterflies of strides 1, 2, 4, 8 among the lanes.
  Lanes butterflies() const {
    __m512 x = v;
    x = combine(x, _mm512_permute_ps(x, 0xB1), 0xAAAA);
    x = combine(x, _mm512_permute_ps(x, 0x4E), 0xCCCC);
    x = combine(x, _mm512_shuffle_f32x4(x, x, 0xB1), 0xF0F0);
    x = combine(x, _mm512_shuffle_f32x4(x, x, 0x4E), 0xFF00);
    return {x};
  }

 private:
  static __mmask16 mask(int64_t n) {
    return n >= 16 ? 0xFFFF : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
  }
  static Lanes from_bf16(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  // Quarters of the result: a0 + a2, a1 + a3, b0 + b2, b1 + b3.
  static __m512 add_halves(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  }
  // x + partner in the lower lane of a pair, partner - x in the upper.
  static __m512 combine(__m512 x, __m512 partner, __mmask16 upper) {
    return _mm512_mask_sub_ps(_mm512_add_ps(x, partner), upper, partner, x);
  }
};

/// Sixteen sums in double.
struct DoubleLanes {
  __m512d lo, hi;  // lanes 0-7, 8-15

  static DoubleLanes zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  void add(Lanes x) {
    lo = _mm512_add_pd(lo, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
    hi = _mm512_add_pd(hi, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)));
  }
  void store(double* p) const {
    _mm512_storeu_pd(p, lo);
    _mm512_storeu_pd(p + 8, hi);
  }
};

}  // namespace
}  // namespace tq
