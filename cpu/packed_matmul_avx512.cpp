// packed_matmul_avx512 - the packed kernel with vpdpbusd. Layout and definition: packed_matmul.cpp.
//
// packed - y = round(x) Q(W)^T
// Shapes    codes [n, padded_cols] s8, panels of 16 rows, y [n, y_stride] f32
// Work      two panels x eight tokens at a time. A 64-byte load gives eight columns of 16 rows:
// low
//           nibbles are four, high nibbles the next four. vpdpbusd adds four u8 * s8 products to
//           each of 16 int32 lanes, exactly; the token's four codes are broadcast. After an inner
//           group the integers become floats and meet their scales.
// Memory    prefill: a panel pair (32 x cols / 2 bytes: 9 KB at 576) stays in the first-level
// cache,
//           tokens stream from the second; decode: every weight byte once
// Constants 2 x 8 = 16 int32 accumulators + 4 weights + mask + broadcast of 32 registers; 2 x 12
//           would fit too, but GCC 12 spills it (measured: 184 against 118 GMAC/s). The float sums
//           live in memory: touched once an inner group. 3 tokens and 1 token are the remainders.
// Requires  AVX-512 F, BW, VL, VNNI (isa_supported)
// Error     none against plain_packed: bit-identical (tests/test_packed_matmul.cpp)
// Source    zero point moved into the start value of the accumulator; kernels of ggml and oneDNN
// use
//           the same instruction on other layouts
// GCC 12 takes the "undefined" operands inside its own intrinsics for our mistake (bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "cpu/packed_matmul_isa.h"

namespace tq {
namespace {

// Weights of four columns, and of the next four for 4 bits, as unsigned bytes.
template <int kBits>
void unpack(const uint8_t* panel, __m512i* low, __m512i* high) {
  const __m512i bytes = _mm512_load_si512(panel);
  if constexpr (kBits == 4) {
    const __m512i nibble = _mm512_set1_epi8(15);
    *low = _mm512_and_si512(bytes, nibble);
    *high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
  } else {
    *low = bytes;
    *high = _mm512_load_si512(panel + 64);
  }
}

// dots += weights of four columns times the four codes at `codes`, for each token.
template <int kPanels, int kTokens>
inline void add_columns(const __m512i* weights, const int8_t* codes, int64_t stride,
                        __m512i (*dots)[kPanels]) {
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    int32_t four;
    __builtin_memcpy(&four, codes + t * stride, 4);
    const __m512i broadcast = _mm512_set1_epi32(four);
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      dots[t][p] = _mm512_dpbusd_epi32(dots[t][p], weights[p], broadcast);
    }
  }
}

template <int kBits, int kPanels, int kTokens>
void tile(const PackedJob& job, int64_t row, int64_t token) {
  constexpr int64_t kStepBytes = 16 * kBits;  // of one panel, eight columns
  const int64_t panel_bytes = job.padded_cols / 8 * kStepBytes;
  const uint8_t* panels = job.panels + row / kPanelRows * panel_bytes;
  const uint16_t* w_scales = job.w_scales + row / kPanelRows * job.n_w_groups * kPanelRows;
  const int8_t* codes = job.codes + token * job.padded_cols;
  const float* x_scales = job.x_scales + token * job.n_x_groups;
  const int32_t* offsets = job.offsets + token * job.n_inner;
  alignas(64) float sums[kTokens][kPanels][kPanelRows] = {};
  for (int64_t group = 0; group < job.n_inner; ++group) {
    const int64_t begin = group * job.inner;
    const int64_t end = begin + job.inner < job.padded_cols ? begin + job.inner : job.padded_cols;
    // Every loop over `dots` is unrolled: with a single index known only at run time the compiler
    // would keep all of it in memory.
    __m512i dots[kTokens][kPanels];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      // The stored code is code + 8 or code + 128; `offsets` is for 8.
      const int32_t start = offsets[t * job.n_inner + group] * (kBits == 4 ? 1 : 16);
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) dots[t][p] = _mm512_set1_epi32(start);
    }
    for (int64_t col = begin; col < end; col += 8) {
      const uint8_t* at = panels + col * (kStepBytes / 8);
      __m512i low[kPanels], high[kPanels];
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) unpack<kBits>(at + p * panel_bytes, &low[p], &high[p]);
      add_columns<kPanels, kTokens>(low, codes + col, job.padded_cols, dots);
      add_columns<kPanels, kTokens>(high, codes + col + 4, job.padded_cols, dots);
    }
    __m512 w_scale[kPanels];
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      const uint16_t* at = w_scales + (p * job.n_w_groups + job.w_group_of[group]) * kPanelRows;
      w_scale[p] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const __m512 x_scale = _mm512_set1_ps(x_scales[t * job.n_x_groups + job.x_group_of[group]]);
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        const __m512 sum =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t][p]), _mm512_mul_ps(x_scale, w_scale[p]),
                            _mm512_load_ps(sums[t][p]));
        _mm512_store_ps(sums[t][p], sum);
      }
    }
  }
  for (int p = 0; p < kPanels; ++p) {
    const int64_t first = row + p * kPanelRows, left = job.row_end - first;
    const __mmask16 inside = left >= kPanelRows ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
    for (int t = 0; t < kTokens; ++t) {
      float* y = job.y + (token + t) * job.y_stride + first;
      __m512 sum = _mm512_load_ps(sums[t][p]);
      if (job.accumulate) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(inside, y), sum);
      _mm512_mask_storeu_ps(y, inside, sum);
    }
  }
}

template <int kBits, int kPanels>
void tokens(const PackedJob& job, int64_t row) {
  int64_t token = job.token_begin;
  for (; token + 8 <= job.token_end; token += 8) tile<kBits, kPanels, 8>(job, row, token);
  for (; token + 3 <= job.token_end; token += 3) tile<kBits, kPanels, 3>(job, row, token);
  for (; token < job.token_end; ++token) tile<kBits, kPanels, 1>(job, row, token);
}

template <int kBits>
void rows(const PackedJob& job) {
  int64_t row = job.row_begin;
  // A single token is a walk through memory: one stream, as the prefetcher likes it.
  const int64_t pair_end = job.token_end - job.token_begin > 1 ? job.row_end - kPanelRows : row;
  for (; row < pair_end; row += 2 * kPanelRows) tokens<kBits, 2>(job, row);
  for (; row < job.row_end; row += kPanelRows) tokens<kBits, 1>(job, row);
}

}  // namespace

void avx512_packed(const PackedJob& job) {
  job.bits == 4 ? rows<4>(job) : rows<8>(job);
}

}  // namespace tq
