// packed_matmul_avx512 - the packed kernel with vpdpbusd. Layout and definition: packed_matmul.cpp.
//
// packed - y = round(x) Q(W)^T
// Shapes    codes [n, padded_cols] s8, panels of 16 rows, y [n, y_stride] f32
// Work      two panels x twelve tokens at a time. A 64-byte load gives eight columns of 16 rows:
// low
//           nibbles are four, high nibbles the next four. vpdpbusd adds four u8 * s8 products to
//           each of 16 int32 lanes, exactly; the token's four codes are broadcast. After an inner
//           group the integers become floats and meet their scales.
// Memory    prefill: a panel pair (32 x cols / 2 bytes: 9 KB at 576) stays in the first-level
// cache,
//           tokens stream from the second; decode: every weight byte once
// Constants 2 x 12 = 24 int32 accumulators + 2 weights + 1 broadcast of 32 registers. The float
// sums
//           live in memory: touched once an inner group, 1 in 16 instructions at group 64.
//           4 tokens and 1 token are the remainders.
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

template <int kBits, int kPanels, int kTokens>
void tile(const PackedJob& job, int64_t row, int64_t token) {
  constexpr int64_t kStepBytes = 16 * kBits;  // of one panel, eight columns
  const int64_t panel_bytes = job.padded_cols / 8 * kStepBytes;
  const uint8_t* panels = job.panels + row / kPanelRows * panel_bytes;
  const uint16_t* w_scales = job.w_scales + row / kPanelRows * job.n_w_groups * kPanelRows;
  const int8_t* codes = job.codes + token * job.padded_cols;
  const float* x_scales = job.x_scales + token * job.n_x_groups;
  const int32_t* offsets = job.offsets + token * job.n_inner;
  __m512 sums[kTokens][kPanels];
  for (int t = 0; t < kTokens; ++t) {
    for (int p = 0; p < kPanels; ++p) sums[t][p] = _mm512_setzero_ps();
  }
  for (int64_t group = 0; group < job.n_inner; ++group) {
    const int64_t begin = group * job.inner;
    const int64_t end = begin + job.inner < job.padded_cols ? begin + job.inner : job.padded_cols;
    __m512i dots[kTokens][kPanels];
    for (int t = 0; t < kTokens; ++t) {
      // The stored code is code + 8 or code + 128; `offsets` is for 8.
      const int32_t start = offsets[t * job.n_inner + group] * (kBits == 4 ? 1 : 16);
      for (int p = 0; p < kPanels; ++p) dots[t][p] = _mm512_set1_epi32(start);
    }
    for (int64_t col = begin; col < end; col += 8) {
      __m512i low[kPanels], high[kPanels];
      for (int p = 0; p < kPanels; ++p) {
        unpack<kBits>(panels + p * panel_bytes + col / 8 * kStepBytes, &low[p], &high[p]);
      }
#pragma GCC unroll 12
      for (int t = 0; t < kTokens; ++t) {
        int32_t four;
        __builtin_memcpy(&four, codes + t * job.padded_cols + col, 4);
        const __m512i broadcast = _mm512_set1_epi32(four);
        for (int p = 0; p < kPanels; ++p) {
          dots[t][p] = _mm512_dpbusd_epi32(dots[t][p], low[p], broadcast);
        }
      }
#pragma GCC unroll 12
      for (int t = 0; t < kTokens; ++t) {
        int32_t four;
        __builtin_memcpy(&four, codes + t * job.padded_cols + col + 4, 4);
        const __m512i broadcast = _mm512_set1_epi32(four);
        for (int p = 0; p < kPanels; ++p) {
          dots[t][p] = _mm512_dpbusd_epi32(dots[t][p], high[p], broadcast);
        }
      }
    }
    for (int p = 0; p < kPanels; ++p) {
      const uint16_t* at = w_scales + (p * job.n_w_groups + job.w_group_of[group]) * kPanelRows;
      const __m512 w_scale =
          _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
      for (int t = 0; t < kTokens; ++t) {
        const float x_scale = x_scales[t * job.n_x_groups + job.x_group_of[group]];
        sums[t][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t][p]),
                                     _mm512_mul_ps(_mm512_set1_ps(x_scale), w_scale), sums[t][p]);
      }
    }
  }
  for (int p = 0; p < kPanels; ++p) {
    const int64_t first = row + p * kPanelRows, left = job.row_end - first;
    const __mmask16 inside = left >= kPanelRows ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
    for (int t = 0; t < kTokens; ++t) {
      float* y = job.y + (token + t) * job.y_stride + first;
      if (job.accumulate) sums[t][p] = _mm512_add_ps(_mm512_maskz_loadu_ps(inside, y), sums[t][p]);
      _mm512_mask_storeu_ps(y, inside, sums[t][p]);
    }
  }
}

template <int kBits, int kPanels>
void tokens(const PackedJob& job, int64_t row) {
  int64_t token = job.token_begin;
  for (; token + 12 <= job.token_end; token += 12) tile<kBits, kPanels, 12>(job, row, token);
  for (; token + 4 <= job.token_end; token += 4) tile<kBits, kPanels, 4>(job, row, token);
  for (; token < job.token_end; ++token) tile<kBits, kPanels, 1>(job, row, token);
}

template <int kBits>
void rows(const PackedJob& job) {
  int64_t row = job.row_begin;
  for (; row + kPanelRows < job.row_end; row += 2 * kPanelRows) tokens<kBits, 2>(job, row);
  if (row < job.row_end) tokens<kBits, 1>(job, row);
}

}  // namespace

void avx512_packed(const PackedJob& job) {
  job.bits == 4 ? rows<4>(job) : rows<8>(job);
}

}  // namespace tq
