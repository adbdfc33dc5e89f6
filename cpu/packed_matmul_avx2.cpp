// packed_matmul_avx2 - the packed kernel with vpmaddubsw. Layout and definition: packed_matmul.cpp.
//
// packed - y = round(x) Q(W)^T
// Shapes    codes [n, padded_cols] s8, panels of 16 rows, y [n, y_stride] f32
// Work      one panel (two registers of 8 rows x 4 columns) x four tokens. 4 bits: vpmaddubsw of
// the
//           unsigned weights with the token's broadcast codes gives sums of two products, at most
//           2 * 15 * 128 = 3840; eight of them fit in 16 bits, so vpmaddwd widens only after eight
//           steps (32 columns). 8 bits: the token's magnitude times the weight with the token's
//           sign moved to it: 2 * 128 * 127 < 2^15, but sums of it need more and are widened at
//           once. (The other way round, -128 of a token would have no negative.)
// Memory    as packed_matmul_avx512.cpp
// Constants 2 x 4 accumulators of 16 bits, 2 weights, a broadcast and masks in 16 registers; the
//           32-bit sums are in memory, touched once in eight steps
// Requires  AVX2, FMA, F16C (isa_supported)
// Error     none against plain_packed: bit-identical (tests/test_packed_matmul.cpp)
#include <immintrin.h>

#include "cpu/packed_matmul_isa.h"

namespace tq {
namespace {

// Half a panel: 8 rows.
constexpr int kHalves = 2;

__m256i load_half(const uint8_t* at) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
}

__m256i broadcast_codes(const int8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, 4);
  return _mm256_set1_epi32(four);
}

// dots += products of columns [begin, end), at most 32 of them.
template <int kTokens>
void add_columns4(const uint8_t* panel, const int8_t* codes, int64_t stride, int64_t begin,
                  int64_t end, __m256i dots[kTokens][kHalves]) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i words[kTokens][kHalves];
  for (int t = 0; t < kTokens; ++t) {
    for (int h = 0; h < kHalves; ++h) words[t][h] = _mm256_setzero_si256();
  }
  for (int64_t col = begin; col < end; col += 8) {
    const __m256i bytes[kHalves] = {load_half(panel + col * 8), load_half(panel + col * 8 + 32)};
    for (int part = 0; part < 2; ++part) {
      __m256i w[kHalves];
      for (int h = 0; h < kHalves; ++h) {
        w[h] = _mm256_and_si256(part ? _mm256_srli_epi16(bytes[h], 4) : bytes[h], nibble);
      }
      for (int t = 0; t < kTokens; ++t) {
        const __m256i four = broadcast_codes(codes + t * stride + col + 4 * part);
        for (int h = 0; h < kHalves; ++h) {
          words[t][h] = _mm256_add_epi16(words[t][h], _mm256_maddubs_epi16(w[h], four));
        }
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int h = 0; h < kHalves; ++h) {
      dots[t][h] = _mm256_add_epi32(dots[t][h], _mm256_madd_epi16(words[t][h], ones));
    }
  }
}

template <int kTokens>
void add_columns8(const uint8_t* panel, const int8_t* codes, int64_t stride, int64_t begin,
                  int64_t end, __m256i dots[kTokens][kHalves]) {
  const __m256i middle = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
  for (int64_t col = begin; col < end; col += 4) {
    for (int h = 0; h < kHalves; ++h) {
      // Back from code + 128 to the signed code: flips the top bit.
      const __m256i w = _mm256_xor_si256(load_half(panel + col * 16 + 32 * h), middle);
      for (int t = 0; t < kTokens; ++t) {
        const __m256i four = broadcast_codes(codes + t * stride + col);
        const __m256i pairs =
            _mm256_maddubs_epi16(_mm256_abs_epi8(four), _mm256_sign_epi8(w, four));
        dots[t][h] = _mm256_add_epi32(dots[t][h], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
}

template <int kBits, int kTokens>
void tile(const PackedJob& job, int64_t row, int64_t token) {
  const uint8_t* panel = job.panels + row / kPanelRows * (job.padded_cols * 2 * kBits);
  const uint16_t* w_scales = job.w_scales + row / kPanelRows * job.n_w_groups * kPanelRows;
  const int8_t* codes = job.codes + token * job.padded_cols;
  const float* x_scales = job.x_scales + token * job.n_x_groups;
  const int32_t* offsets = job.offsets + token * job.n_inner;
  __m256 sums[kTokens][kHalves];
  for (int t = 0; t < kTokens; ++t) {
    for (int h = 0; h < kHalves; ++h) sums[t][h] = _mm256_setzero_ps();
  }
  for (int64_t group = 0; group < job.n_inner; ++group) {
    const int64_t begin = group * job.inner;
    const int64_t end = begin + job.inner < job.padded_cols ? begin + job.inner : job.padded_cols;
    __m256i dots[kTokens][kHalves];
    for (int t = 0; t < kTokens; ++t) {
      // 8-bit codes are made signed again below and need no correction.
      const int32_t start = kBits == 4 ? offsets[t * job.n_inner + group] : 0;
      for (int h = 0; h < kHalves; ++h) dots[t][h] = _mm256_set1_epi32(start);
    }
    for (int64_t col = begin; col < end; col += 32) {
      const int64_t stop = col + 32 < end ? col + 32 : end;
      if constexpr (kBits == 4) {
        add_columns4<kTokens>(panel, codes, job.padded_cols, col, stop, dots);
      } else {
        add_columns8<kTokens>(panel, codes, job.padded_cols, col, stop, dots);
      }
    }
    const uint16_t* scales_at = w_scales + job.w_group_of[group] * kPanelRows;
    for (int h = 0; h < kHalves; ++h) {
      const __m256 w_scale =
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales_at) + h));
      for (int t = 0; t < kTokens; ++t) {
        const float x_scale = x_scales[t * job.n_x_groups + job.x_group_of[group]];
        sums[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t][h]),
                                     _mm256_mul_ps(_mm256_set1_ps(x_scale), w_scale), sums[t][h]);
      }
    }
  }
  const int64_t n_rows = job.row_end - row < kPanelRows ? job.row_end - row : kPanelRows;
  for (int t = 0; t < kTokens; ++t) {
    float* y = job.y + (token + t) * job.y_stride + row;
    float values[kPanelRows];
    _mm256_storeu_ps(values, sums[t][0]);
    _mm256_storeu_ps(values + 8, sums[t][1]);
    for (int64_t r = 0; r < n_rows; ++r) y[r] = job.accumulate ? y[r] + values[r] : values[r];
  }
}

template <int kBits>
void rows(const PackedJob& job) {
  for (int64_t row = job.row_begin; row < job.row_end; row += kPanelRows) {
    int64_t token = job.token_begin;
    for (; token + 4 <= job.token_end; token += 4) tile<kBits, 4>(job, row, token);
    for (; token < job.token_end; ++token) tile<kBits, 1>(job, row, token);
  }
}

}  // namespace

void avx2_packed(const PackedJob& job) {
  job.bits == 4 ? rows<4>(job) : rows<8>(job);
}

}  // namespace tq
