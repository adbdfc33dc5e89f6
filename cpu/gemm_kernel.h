// gemm_kernel - the fast gemm on sixteen lanes. Definition of the sum: gemm.h.
//
// Included by ops_avx2.cpp and ops_avx512.cpp after lanes_*.h, never elsewhere.
//
// gemm - c (+)= a b
// Shapes    a [rows, depth], b [depth, cols], c [rows, cols] f32, strides
// Work      depth in blocks of 256: b packed in panels of up to 64 columns [256, 64] (second-level
//           cache), then six rows of a at a time packed [256, 8] (first-level cache) against every
//           panel; 6 x 64 sums stay in registers for the whole block
// Memory    of a panel step: 256 bytes of b from the second-level cache for 24 fma
// Constants 6 rows x 4 vectors: 24 accumulators of 32 AVX-512 registers, 6 x 2 of 16 AVX2
// Requires  scratch aligned to 64 bytes
// Error     none against plain_gemm: bit-identical (tests/test_gemm.cpp)
// Source    Goto and van de Geijn 2008
// Measured  one Zen 4 core (116 GFLOP/s of fma), CPU time, x w^T of [tokens, in] and [out, in]:
//             [512, 576] [1536, 576]     AVX-512 99, dense kernel 89; AVX2 90, dense kernel 39
//             [512, 4096] [4096, 4096]   AVX-512 96, dense kernel 62; AVX2 84, dense kernel 36
//           x w and x^T w within 5 % of that. The dense kernel (matmul.h) sums along 16 lanes from
//           the mapped file, for which it needs no packing; for training it would need transposed
//           copies as well. 2026-11, bench_cpu --benchmark_filter=Gemm
#pragma once

#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace tq {
namespace {

constexpr int kGemmRows = 6;
constexpr int64_t kPackedRows = 8;  // six and two that are not used: packed by 8 x 8 transposes
constexpr int64_t kGemmPanel = 64;

// to[j * to_row + i] = from[i * from_row + j] for i, j < 8.
void transpose_8x8(const float* from, int64_t from_row, float* to, int64_t to_row) {
  __m256 r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_row);
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xEE);
    r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

// to[k, j] = b(k, j) for `width` (a multiple of 16) columns, zeros behind the last of `cols`.
void pack_panel(const float* b, int64_t b_depth, int64_t b_col, int64_t depth, int64_t cols,
                int64_t width, float* to) {
  if (b_col == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < width; j += kLanes) {
        Lanes::load_first(b + k * b_depth + j, cols - j).store(to + k * width + j);
      }
    }
    return;
  }
  int64_t j = 0;
  if (b_depth == 1) {
    for (; j + 8 <= width && j + 8 <= cols; j += 8) {
      int64_t k = 0;
      for (; k + 8 <= depth; k += 8) {
        transpose_8x8(b + j * b_col + k, b_col, to + k * width + j, width);
      }
      for (; k < depth; ++k) {
        for (int64_t i = j; i < j + 8; ++i) to[k * width + i] = b[i * b_col + k];
      }
    }
  }
  for (; j < width; ++j) {
    for (int64_t k = 0; k < depth; ++k) {
      to[k * width + j] = j < cols ? b[k * b_depth + j * b_col] : 0.0f;
    }
  }
}

// to[k, i] = a(i, k) for `rows` rows, kPackedRows floats a step; `readable` rows of a exist.
void pack_rows(const float* a, int64_t a_row, int64_t a_depth, int64_t rows, int64_t readable,
               int64_t depth, float* to) {
  int64_t k = 0;
  if (readable >= kPackedRows && a_row == 1) {
    for (; k < depth; ++k) {
      _mm256_storeu_ps(to + k * kPackedRows, _mm256_loadu_ps(a + k * a_depth));
    }
  } else if (readable >= kPackedRows && a_depth == 1) {
    for (; k + 8 <= depth; k += 8) transpose_8x8(a + k, a_row, to + k * kPackedRows, kPackedRows);
  }
  for (; k < depth; ++k) {
    for (int64_t i = 0; i < rows; ++i) to[k * kPackedRows + i] = a[i * a_row + k * a_depth];
  }
}

// kRows x (kVectors * 16) elements of c, of which the first `cols` columns exist.
template <int kRows, int kVectors>
void gemm_tile(const float* a, const float* b, int64_t b_width, int64_t depth, bool add, float* c,
               int64_t c_row, int64_t cols) {
  Lanes sums[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) sums[i][j] = Lanes::zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    Lanes columns[kVectors];
    for (int j = 0; j < kVectors; ++j) columns[j] = Lanes::load(b + k * b_width + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const Lanes factor = Lanes::set(a[k * kPackedRows + i]);
      for (int j = 0; j < kVectors; ++j) sums[i][j] = Lanes::fma(factor, columns[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* at = c + i * c_row + j * kLanes;
      const int64_t n = cols - j * kLanes;
      const Lanes before = add ? Lanes::load_first(at, n) : Lanes::zero();
      (before + sums[i][j]).store_first(at, n);
    }
  }
}

template <int kRows>
void gemm_panel(const float* a, const float* b, int64_t width, int64_t depth, bool add, float* c,
                int64_t c_row, int64_t cols) {
  constexpr int kWide = Lanes::kWide;
  int64_t j = 0;
  for (; j + kWide * kLanes <= width; j += kWide * kLanes) {
    gemm_tile<kRows, kWide>(a, b + j, width, depth, add, c + j, c_row, cols - j);
  }
  if constexpr (kWide > 2) {
    for (; j + 2 * kLanes <= width; j += 2 * kLanes) {
      gemm_tile<kRows, 2>(a, b + j, width, depth, add, c + j, c_row, cols - j);
    }
  }
  for (; j < width; j += kLanes) {
    gemm_tile<kRows, 1>(a, b + j, width, depth, add, c + j, c_row, cols - j);
  }
}

void gemm_rows(const float* a, const float* b, int64_t width, int64_t depth, bool add, float* c,
               int64_t c_row, int64_t rows, int64_t cols) {
  switch (rows) {
    case 6:
      return gemm_panel<6>(a, b, width, depth, add, c, c_row, cols);
    case 5:
      return gemm_panel<5>(a, b, width, depth, add, c, c_row, cols);
    case 4:
      return gemm_panel<4>(a, b, width, depth, add, c, c_row, cols);
    case 3:
      return gemm_panel<3>(a, b, width, depth, add, c, c_row, cols);
    case 2:
      return gemm_panel<2>(a, b, width, depth, add, c, c_row, cols);
    case 1:
      return gemm_panel<1>(a, b, width, depth, add, c, c_row, cols);
  }
}

// One block of depth, up to kGemmCols columns.
void gemm_block(const GemmJob& job, int64_t col, int64_t n_cols, int64_t k, int64_t depth) {
  float* packed_a = job.scratch;
  float* packed_b = job.scratch + kGemmDepth * kPackedRows;
  const auto panel_width = [&](int64_t j) {
    const int64_t left = (n_cols - j + kLanes - 1) / kLanes * kLanes;
    return left < kGemmPanel ? left : kGemmPanel;
  };
  for (int64_t j = 0; j < n_cols; j += kGemmPanel) {
    pack_panel(job.b + k * job.b_depth + (col + j) * job.b_col, job.b_depth, job.b_col, depth,
               n_cols - j, panel_width(j), packed_b + j * depth);
  }
  const bool add = job.accumulate || k > 0;
  for (int64_t i = 0; i < job.rows; i += kGemmRows) {
    const int64_t rows = job.rows - i < kGemmRows ? job.rows - i : kGemmRows;
    pack_rows(job.a + i * job.a_row + k * job.a_depth, job.a_row, job.a_depth, rows, job.rows - i,
              depth, packed_a);
    for (int64_t j = 0; j < n_cols; j += kGemmPanel) {
      gemm_rows(packed_a, packed_b + j * depth, panel_width(j), depth, add,
                job.c + i * job.c_row + col + j, job.c_row, rows, n_cols - j);
    }
  }
}

void lanes_gemm(const GemmJob& job) {
  for (int64_t col = 0; col < job.cols; col += kGemmCols) {
    const int64_t n_cols = job.cols - col < kGemmCols ? job.cols - col : kGemmCols;
    int64_t k = 0;
    do {  // also once for depth 0, which still writes c
      const int64_t depth = job.depth - k < kGemmDepth ? job.depth - k : kGemmDepth;
      gemm_block(job, col, n_cols, k, depth);
      k += kGemmDepth;
    } while (k < job.depth);
  }
}

}  // namespace
}  // namespace tq
