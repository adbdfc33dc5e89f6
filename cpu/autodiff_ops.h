// autodiff_ops - products, elementwise operations, norms and losses on a tape.
//
// Every operand comes from the same tape; shapes are [batch, rows, cols], and an operand of batch 1
// serves the whole batch of the other. Not here: rounding (autodiff_rounding.h), attention and the
// head (autodiff_model.h). Read next: autodiff_ops.cpp, autodiff_matmul.cpp.
#pragma once

#include "cpu/autodiff.h"
#include "cpu/hadamard.h"

namespace tq {

/// x w^T: x [rows, in], w [out, in] -> [rows, out]. The form of every linear.
Var matmul_nt(const Var& x, const Var& w);
/// a b: a [rows, n], b [n, cols] -> [rows, cols]
Var matmul_nn(const Var& a, const Var& b);
/// a^T b: a [n, rows], b [n, cols] -> [rows, cols]
Var matmul_tn(const Var& a, const Var& b);

/// Every block of q.cols columns of w times q: w diag(q, ..., q). w [rows, n * q.rows],
/// q [m, m] square.
Var fold_right(const Var& w, const Var& q);
/// diag(q, ..., q)^T w: every block of q.rows rows of w from the left. w [n * q.rows, cols].
Var fold_left(const Var& w, const Var& q);
/// x transformed row by row (or its inverse, the transpose). `transform` outlives the tape.
Var hadamard(const Var& x, const FastTransform& transform, bool inverse = false);
/// Inverse of every matrix of a [batch, r, r], in f64 inside. Throws kBadData if one is singular.
Var inverse(const Var& a);

Var add(const Var& a, const Var& b);
Var sub(const Var& a, const Var& b);
Var mul(const Var& a, const Var& b);  // element by element
Var scale(const Var& x, float factor);
/// x[b, i, j] + row[b, 0, j]; x[b, i, j] * row[b, 0, j]
Var add_row(const Var& x, const Var& row);
Var mul_row(const Var& x, const Var& row);
/// The same elements in another shape of equal size.
Var reshape(const Var& x, Shape shape);
/// x / sqrt(mean(x^2) + eps), every row of the last dimension by itself; times gain: mul_row.
Var rms_norm(const Var& x, float eps);
/// gate / (1 + exp(-gate)) * up
Var silu_mul(const Var& gate, const Var& up);
/// exp(x - max) / sum, row by row.
Var softmax(const Var& x);

/// Sum of all elements squared, [1, 1, 1].
Var sum_squares(const Var& x);
/// Sum over the batch of ||y[b] - target[b]||^2 / ||target[b]||^2; target needs no gradient.
Var relative_error(const Var& y, const Var& target);

}  // namespace tq
