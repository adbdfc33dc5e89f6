// lanes_avx2 - sixteen floats in two AVX2 registers. Included by *_avx2.cpp files only.
//
// See lanes_avx512.h: the same vocabulary, the same bits.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

namespace tq {
namespace {

struct Lanes {
  __m256 lo, hi;  // lanes 0-7, 8-15

  // 2 x 3 or 6 x 1 accumulators of two registers each leave four of the sixteen for operands.
  static constexpr int kDenseRows = 2, kDenseTokens = 3, kWide = 1;

  static Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Lanes set(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Lanes load_first(const float* p, int64_t n) {
    // A masked load touches nothing outside its mask, but its address must not be formed outside.
    return {_mm256_maskload_ps(p, mask(n)),
            n > 8 ? _mm256_maskload_ps(p + 8, mask(n - 8)) : _mm256_setzero_ps()};
  }
  static Lanes load_f16(const void* p) {
    const __m128i* at = static_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
  }
  static Lanes load_f16_first(const void* p, int64_t n) {
    uint16_t bits[16] = {};
    std::memcpy(bits, p, static_cast<size_t>(n) * 2);
    return load_f16(bits);
  }
  static Lanes load_bf16(const void* p) {
    const __m128i* at = static_cast<const __m128i*>(p);
    return {from_bf16(_mm_loadu_si128(at)), from_bf16(_mm_loadu_si128(at + 1))};
  }
  static Lanes load_bf16_first(const void* p, int64_t n) {
    uint16_t bits[16] = {};
    std::memcpy(bits, p, static_cast<size_t>(n) * 2);
    return load_bf16(bits);
  }
  static Lanes load_codes4(const void* p) {
    const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
    const __m128i nibble = _mm_set1_epi8(15);
    const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(bytes, nibble),
                                            _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble));
    return from_codes(_mm_sub_epi8(codes, _mm_set1_epi8(8)));
  }
  static Lanes load_codes8(const void* p) {
    return from_codes(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static Lanes load_u8(const void* p) {
    return from_bytes(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static Lanes load_nibbles(const void* p, bool high) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return from_bytes(_mm_and_si128(high ? _mm_srli_epi16(bytes, 4) : bytes, _mm_set1_epi8(15)));
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  void store_first(float* p, int64_t n) const {
    _mm256_maskstore_ps(p, mask(n), lo);
    if (n > 8) _mm256_maskstore_ps(p + 8, mask(n - 8), hi);
  }
  void store_f16_first(uint16_t* p, int64_t n) const {
    uint16_t bits[16];
    __m128i* at = reinterpret_cast<__m128i*>(bits);
    _mm_storeu_si128(at, _mm256_cvtps_ph(lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(at + 1, _mm256_cvtps_ph(hi, _MM_FROUND_TO_NEAREST_INT));
    std::memcpy(p, bits, static_cast<size_t>(n < 16 ? n : 16) * 2);
  }
  void store_codes_first(int8_t* p, int64_t n) const {
    const __m256i words = _mm256_permute4x64_epi64(
        _mm256_packs_epi32(_mm256_cvtps_epi32(lo), _mm256_cvtps_epi32(hi)), 0xD8);
    const __m128i codes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    if (n >= 16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
      return;
    }
    int8_t bytes[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), codes);
    std::memcpy(p, bytes, static_cast<size_t>(n));
  }

  static Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  friend Lanes operator+(Lanes a, Lanes b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
  }
  friend Lanes operator-(Lanes a, Lanes b) {
    return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
  }
  friend Lanes operator*(Lanes a, Lanes b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
  }
  friend Lanes operator/(Lanes a, Lanes b) {
    return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
  }
  static Lanes max(Lanes a, Lanes b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
  }
  static Lanes min(Lanes a, Lanes b) {
    return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
  }
  static Lanes select_less(Lanes a, Lanes b, Lanes yes, Lanes no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
  }
  static Lanes scale_by_low_bits(Lanes value, Lanes shifted) {
    return {add_exponent(value.lo, shifted.lo), add_exponent(value.hi, shifted.hi)};
  }
  static Lanes keep_first(Lanes value, int64_t n, Lanes rest) {
    return {_mm256_blendv_ps(rest.lo, value.lo, _mm256_castsi256_ps(mask(n))),
            _mm256_blendv_ps(rest.hi, value.hi, _mm256_castsi256_ps(mask(n - 8)))};
  }
  static Lanes max_magnitude(Lanes a, Lanes b) {
    return {larger_magnitude(a.lo, b.lo), larger_magnitude(a.hi, b.hi)};
  }
  float max_of_magnitudes() const {
    const __m256 eight = larger_magnitude(lo, hi);
    __m128i four = _mm_max_epi32(_mm_castps_si128(_mm256_castps256_ps128(eight)),
                                 _mm_castps_si128(_mm256_extractf128_ps(eight, 1)));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1));
    return _mm_cvtss_f32(_mm_castsi128_ps(four));
  }
  float max_of_lanes() const {
    const __m256 eight = _mm256_max_ps(lo, hi);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
  }
  float sum() const {
    const __m256 eight = _mm256_add_ps(lo, hi);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static void store_sums(const Lanes* a, bool accumulate, float* out) {
    for (int i = 0; i < kDenseRows; ++i) out[i] = accumulate ? out[i] + a[i].sum() : a[i].sum();
  }
  Lanes butterflies() const {
    Lanes x = {within_register(lo), within_register(hi)};
    return {_mm256_add_ps(x.lo, x.hi), _mm256_sub_ps(x.lo, x.hi)};
  }

 private:
  // All ones in the first n of 8 lanes.
  static __m256i mask(int64_t n) {
    const int count = n > 8 ? 8 : n < 0 ? 0 : static_cast<int>(n);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m256 from_bf16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Lanes from_bytes(__m128i bytes) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
  }
  static Lanes from_codes(__m128i codes) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)))};
  }
  static __m256 add_exponent(__m256 value, __m256 shifted) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), exponent));
  }
  static __m256 larger_magnitude(__m256 a, __m256 b) {
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(b), _mm256_set1_epi32(0x7FFFFFFF));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), bits));
  }
  // Butterflies of strides 1, 2, 4: x + partner below, partner - x above.
  static __m256 within_register(__m256 x) {
    x = combine<0xAA>(x, _mm256_permute_ps(x, 0xB1));
    x = combine<0xCC>(x, _mm256_permute_ps(x, 0x4E));
    return combine<0xF0>(x, _mm256_permute2f128_ps(x, x, 1));
  }
  template <int kUpper>
  static __m256 combine(__m256 x, __m256 partner) {
    return _mm256_blend_ps(_mm256_add_ps(x, partner), _mm256_sub_ps(partner, x), kUpper);
  }
};

struct DoubleLanes {
  __m256d quarters[4];  // lanes 0-3, 4-7, 8-11, 12-15

  static DoubleLanes zero() {
    const __m256d none = _mm256_setzero_pd();
    return {{none, none, none, none}};
  }
  void add(Lanes x) {
    quarters[0] = _mm256_add_pd(quarters[0], _mm256_cvtps_pd(_mm256_castps256_ps128(x.lo)));
    quarters[1] = _mm256_add_pd(quarters[1], _mm256_cvtps_pd(_mm256_extractf128_ps(x.lo, 1)));
    quarters[2] = _mm256_add_pd(quarters[2], _mm256_cvtps_pd(_mm256_castps256_ps128(x.hi)));
    quarters[3] = _mm256_add_pd(quarters[3], _mm256_cvtps_pd(_mm256_extractf128_ps(x.hi, 1)));
  }
  void store(double* p) const {
    for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, quarters[i]);
  }
};

}  // namespace
}  // namespace tq
