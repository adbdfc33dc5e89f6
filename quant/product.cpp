// product - see product.h.
#include "quant/product.h"

#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "model/error.h"

namespace tq {
namespace {

// a b with b's elements (k, j) at k * b_depth + j * b_col.
FloatMatrix multiply(const FloatMatrix& a, const FloatMatrix& b, int64_t cols, int64_t b_depth,
                     int64_t b_col, int threads) {
  FloatMatrix c{a.rows, cols, {}};
  c.data.resize(static_cast<size_t>(a.rows * cols));
  GemmJob job = {};
  job.a = a.data.data();
  job.a_row = a.cols;
  job.a_depth = 1;
  job.b = b.data.data();
  job.b_depth = b_depth;
  job.b_col = b_col;
  job.c = c.data.data();
  job.c_row = cols;
  job.rows = a.rows;
  job.cols = cols;
  job.depth = a.cols;
  run_gemms(kernels_for(best_isa()), threads, {&job, 1});
  return c;
}

}  // namespace

FloatMatrix product_nt(const FloatMatrix& a, const FloatMatrix& b, int threads) {
  TQ_CHECK(a.cols == b.cols);
  return multiply(a, b, b.rows, 1, b.cols, threads);
}

FloatMatrix product_nn(const FloatMatrix& a, const FloatMatrix& b, int threads) {
  TQ_CHECK(a.cols == b.rows);
  return multiply(a, b, b.cols, b.cols, 1, threads);
}

FloatMatrix product_tn(const FloatMatrix& a, const FloatMatrix& b, int threads) {
  TQ_CHECK(a.rows == b.rows);
  FloatMatrix c{a.cols, b.cols, {}};
  c.data.assign(static_cast<size_t>(c.size()), 0.0f);
  add_product_tn(a.data.data(), b.data.data(), a.rows, c, threads);
  return c;
}

void add_product_tn(const float* a, const float* b, int64_t rows, FloatMatrix& sum, int threads) {
  GemmJob job = {};
  job.a = a;
  job.a_row = 1;
  job.a_depth = sum.rows;
  job.b = b;
  job.b_depth = sum.cols;
  job.b_col = 1;
  job.c = sum.data.data();
  job.c_row = sum.cols;
  job.rows = sum.rows;
  job.cols = sum.cols;
  job.depth = rows;
  job.accumulate = true;
  run_gemms(kernels_for(best_isa()), threads, {&job, 1});
}

void subtract(FloatMatrix& a, const FloatMatrix& b) {
  TQ_CHECK(a.rows == b.rows && a.cols == b.cols);
  for (size_t i = 0; i < a.data.size(); ++i) a.data[i] -= b.data[i];
}

void add(FloatMatrix& a, const FloatMatrix& b) {
  TQ_CHECK(a.rows == b.rows && a.cols == b.cols);
  for (size_t i = 0; i < a.data.size(); ++i) a.data[i] += b.data[i];
}

}  // namespace tq
