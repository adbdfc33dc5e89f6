// strip - sixteen rows of a matrix, transposed: the unit of work of rounding and GPTQ.
//
// Rows of a weight never interact in these algorithms, so a row is a SIMD lane and every sum runs
// along the columns in index order. That makes results independent of threads and of the
// instruction set (no lane ever meets another, and -ffp-contract=off keeps a*b+c two roundings).
#pragma once

#include <algorithm>
#include <cstdint>

#include "quant/owned.h"

// The same function for several instruction sets, chosen by the dynamic loader. Sanitized builds
// run constructors too late for that, and do not need the speed.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define TQ_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TQ_CLONES
#endif

namespace tq {

constexpr int64_t kStripRows = 16;

using Lanes = float __attribute__((vector_size(64), may_alias));  // one column of a strip
using LaneInts = int32_t __attribute__((vector_size(64), may_alias));
using WideLanes = double __attribute__((vector_size(64), may_alias));  // half a column

inline int64_t n_strips(int64_t rows) {
  return (rows + kStripRows - 1) / kStripRows;
}

/// Columns of rows [16 * strip, 16 * strip + 16) as [cols][16]; rows past the end are zero.
/// column(position): which column stands at a position of `out`.
template <typename Column>
void load_strip(const FloatMatrix& w, int64_t strip, const Column& column, float* out) {
  const int64_t first = strip * kStripRows;
  const int64_t count = std::min(kStripRows, w.rows - first);
  if (count < kStripRows) std::fill(out, out + w.cols * kStripRows, 0.0f);
  for (int64_t lane = 0; lane < count; ++lane) {
    const float* row = w.row(first + lane);
    for (int64_t col = 0; col < w.cols; ++col) out[col * kStripRows + lane] = row[column(col)];
  }
}
inline void load_strip(const FloatMatrix& w, int64_t strip, float* out) {
  load_strip(
      w, strip, [](int64_t col) { return col; }, out);
}

}  // namespace tq
