// packed_matmul - 4- and 8-bit weights times rounded tokens: exact integers inside a group, one f32
// fma per group.
//
// The definition of a quantized linear's result (docs/method.md): the inner group is the greatest
// common divisor of the weight's and the token's group, or the smaller one where the other is the
// whole row; dot is the exact integer sum over an inner group;
//   y = fma(float(dot), s_token * s_weight, y)   over inner groups in ascending order,
// the product of scales rounded to f32. Nothing depends on the number of tokens, the threads or the
// instruction set. Not here: how tokens are rounded (ops.h, plain_round), dense weights (matmul.h).
// Read next: packed_matmul.cpp (layout and plain kernel), packed_matmul_avx512.cpp.
#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "model/tensor.h"
#include "model/weights.h"

namespace tq {

/// Tokens rounded to integers. Columns behind the last one are zero codes.
struct RoundedTokens {
  int64_t cols = 0, padded_cols = 0;  // padded to a multiple of 8
  int64_t group = 0, n_groups = 0;
  int8_t* codes = nullptr;  // [n, padded_cols]
  float* scales = nullptr;  // [n, n_groups]
};

/// A packed matrix in the order in which the kernels read it.
struct PackedPanels {
  int64_t rows = 0, cols = 0, padded_cols = 0;
  int bits = 4;
  int64_t inner = 0, n_inner = 0;               // inner groups
  int64_t n_w_groups = 0, n_x_groups = 0;       // per row of weights, per token
  std::vector<int32_t> w_group_of, x_group_of;  // [n_inner]
  AlignedBuffer codes, scales;

  int64_t n_panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
  size_t n_bytes() const { return codes.size() + scales.size(); }
};

/// Repacks w for tokens rounded in groups of x_group columns. Groups must be multiples of 8, or
/// span all columns. Throws kBadData otherwise.
PackedPanels pack_panels(const Matrix& w, int64_t x_group, int n_threads);

/// A job over all of a matrix. offsets[t, i] = -8 * (sum of the codes of token t in inner group i).
PackedJob packed_job(const PackedPanels& w, const RoundedTokens& tokens, const int32_t* offsets,
                     float* y, int64_t n_tokens);

void plain_packed(const PackedJob& job);

}  // namespace tq
