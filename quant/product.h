// product - f32 products of whole matrices for the quantizer, by the kernels of cpu/gemm.h.
//
// Results depend on neither the number of threads nor the instruction set. Not here: f64 algebra of
// small matrices (eigen.h). Read next: site_stats.h, branch.h, which are written in these terms.
#pragma once

#include "quant/owned.h"

namespace tq {

/// a b^T: a [m, k], b [n, k] -> [m, n]
FloatMatrix product_nt(const FloatMatrix& a, const FloatMatrix& b, int threads);
/// a b: a [m, k], b [k, n] -> [m, n]
FloatMatrix product_nn(const FloatMatrix& a, const FloatMatrix& b, int threads);
/// a^T b: a [k, m], b [k, n] -> [m, n]
FloatMatrix product_tn(const FloatMatrix& a, const FloatMatrix& b, int threads);
/// sum [m, n] += a^T b for row-major a [rows, m], b [rows, n].
void add_product_tn(const float* a, const float* b, int64_t rows, FloatMatrix& sum, int threads);

/// a <- a - b, a + b
void subtract(FloatMatrix& a, const FloatMatrix& b);
void add(FloatMatrix& a, const FloatMatrix& b);

}  // namespace tq
