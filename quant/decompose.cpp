// decompose - truncated SVD and the split of a weight. See decompose.h.
#include "quant/decompose.h"

#include <algorithm>
#include <cmath>

#include "model/error.h"
#include "quant/eigen.h"
#include "quant/rng.h"
#include "quant/rounding.h"

namespace tq {
namespace {

// Extra directions and power steps of the subspace iteration: an even spectrum (a rotated weight)
// separates slowly, and what the sketch misses becomes residual.
constexpr int64_t kOversampling = 16;
constexpr int kPowerSteps = 6;

MatrixRM to_eigen(const FloatMatrix& w) {
  return Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(
             w.data.data(), w.rows, w.cols)
      .cast<double>();
}

FloatMatrix from_eigen(const MatrixRM& m) {
  FloatMatrix w{m.rows(), m.cols(), {}};
  w.data.resize(static_cast<size_t>(m.size()));
  std::transform(m.data(), m.data() + m.size(), w.data.begin(),
                 [](double value) { return static_cast<float>(value); });
  return w;
}

MatrixRM orthonormal_basis(const MatrixRM& m) {
  const Eigen::HouseholderQR<Eigen::MatrixXd> qr(m);
  return qr.householderQ() * MatrixRM::Identity(m.rows(), m.cols());
}

OwnedMatrix store_factor(const FloatMatrix& w, const RoundingSpec& branch) {
  if (branch.bits == 16) return store_dense(w.data, w.rows, w.cols, choose_16_bit(w.data));
  return round_matrix(w, branch, nullptr, 1).matrix;
}

}  // namespace

LowRank truncated_svd(const FloatMatrix& w, int64_t rank) {
  TQ_CHECK(rank > 0 && rank <= std::min(w.rows, w.cols));
  const MatrixRM full = to_eigen(w);
  const int64_t width = std::min({rank + kOversampling, w.rows, w.cols});
  SplitMix64 rng(0x7157, static_cast<uint64_t>(width));
  MatrixRM basis(w.cols, width);
  for (int64_t i = 0; i < basis.size(); ++i) basis.data()[i] = rng.normal();
  MatrixRM left;
  for (int step = 0; step <= kPowerSteps; ++step) {
    left = orthonormal_basis(full * basis);
    basis = full.transpose() * left;  // [in, width]
    if (step < kPowerSteps) basis = orthonormal_basis(basis);
  }
  // w ~ left basis^T; the small SVD of basis finishes the job.
  const Eigen::JacobiSVD<Eigen::MatrixXd> svd(basis, Eigen::ComputeThinU | Eigen::ComputeThinV);
  const Eigen::VectorXd root = svd.singularValues().head(rank).cwiseSqrt();
  LowRank result;
  result.b = from_eigen(left * svd.matrixV().leftCols(rank) * root.asDiagonal());
  result.a = from_eigen(root.asDiagonal() * svd.matrixU().leftCols(rank).transpose());
  return result;
}

FloatMatrix subtract_product(const FloatMatrix& w, const FloatMatrix& b, const FloatMatrix& a) {
  return from_eigen(to_eigen(w) - to_eigen(b) * to_eigen(a));
}

Decomposed decompose(const FloatMatrix& w, int64_t rank, const RoundingSpec& branch) {
  const LowRank factors = truncated_svd(w, rank);
  Decomposed result;
  result.a = store_factor(factors.a, branch);
  result.b = store_factor(factors.b, branch);
  result.residual =
      subtract_product(w, to_float_matrix(result.b.view()), to_float_matrix(result.a.view()));
  return result;
}

}  // namespace tq
