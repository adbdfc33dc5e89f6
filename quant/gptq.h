// gptq - what GPTQ and the output-error report know about a linear's inputs.
//
// Gram: H = sum over calibration tokens of x x^T. GptqFactor: the triangular factor of H^-1 that
// tells how an error in one column is best compensated by the columns after it. Not here: the
// rounding itself (rounding.cpp). Source: Frantar et al. 2023, arXiv 2210.17323, section 3.
#pragma once

#include <cstdint>
#include <vector>

#include "quant/owned.h"

namespace tq {

/// H = sum x x^T over rows, [n, n] f64. Products of up to 256 rows are summed in f32, those sums
/// in f64: with everything in a short format H is not positive definite at w_down's inputs.
class Gram {
 public:
  explicit Gram(int64_t n);
  /// Adds x [rows, n]. The result does not depend on `threads`, but on how rows are cut into calls.
  void add(const float* x, int64_t rows, int threads);
  int64_t size() const { return n_; }
  int64_t n_rows() const { return n_rows_; }
  const double* data() const { return sum_.data(); }  // [n, n], upper triangle valid
  /// Entry (i, j); H is symmetric, only one triangle is stored.
  double at(int64_t i, int64_t j) const {
    return i <= j ? sum_[static_cast<size_t>(i * n_ + j)] : sum_[static_cast<size_t>(j * n_ + i)];
  }

 private:
  int64_t n_, n_rows_ = 0;
  std::vector<double> sum_;  // [n, n], 16 x 16 tiles on and above the diagonal
};

/// In which order a walk visits the columns: position -> column. Empty: as they stand.
using ColumnOrder = std::vector<int64_t>;

/// Loud inputs first (GPTQ's "activation order"): their columns are rounded while most others can
/// still compensate. Groups of `group` columns stay together, by their largest H_ii, and so does a
/// short last group, at the end: a group's scale is found when the walk enters it.
ColumnOrder activation_order(const Gram& gram, int64_t group);

/// U upper triangular with (H + damping I)^-1 = U^T U, f32 [n, n] row-major; rows and columns of H
/// in `order`.
struct GptqFactor {
  int64_t n = 0;
  double damping = 0;  // what was added to the diagonal of H
  std::vector<float> u;
  ColumnOrder order;
  int64_t column(int64_t position) const {
    return order.empty() ? position : order[static_cast<size_t>(position)];
  }
};

/// Damping starts at 1 % of the mean diagonal and grows tenfold until the Cholesky factorisation
/// succeeds. An all-zero H gives the identity (GPTQ then equals rounding to nearest).
/// Throws kBadData when H is not finite; `where` names the linear.
GptqFactor factorize(const Gram& gram, int threads, const char* where, ColumnOrder order = {});

/// trace(W H W^T): the energy of the outputs of W over the calibration tokens; with W - W' the
/// energy of the output error. In f64: a rounding error orthogonal to a dominant direction of H is
/// the difference of large terms.
double output_energy(const FloatMatrix& w, const Gram& gram, int threads);

}  // namespace tq
