// subspace_rotation - the planes of an orthogonal matrix, largest angles first. See its header.
#include "quant/subspace_rotation.h"

#include <algorithm>
#include <vector>

#include "model/error.h"
#include "quant/stiefel.h"

namespace tq {
namespace {

// Eigenvalues 2 cos(theta) that lie closer than this are separated by a Schur form instead: their
// eigenvectors mix, and a plane could be cut in two. Across a wider gap they mix by 1e-9 at most.
constexpr double kCluster = 1e-7;

// What T maps to itself: a plane, or one vector with T v = v or T v = -v.
struct InvariantSpace {
  MatrixRM columns;  // [n, 2] or [n, 1]
  double cost = 0;   // of dropping it, a column
};

double cost_a_column(const MatrixRM& t, const MatrixRM& columns, const MatrixRM* second_moment) {
  const double size = static_cast<double>(columns.cols());
  const double turn = (t * columns - columns).squaredNorm() / size;  // 4 sin^2(theta / 2)
  if (!second_moment) return turn;
  return turn * (columns.transpose() * *second_moment * columns).trace() / size;
}

// Splits the span of `vectors`, invariant under T, along the diagonal blocks of the real Schur form
// of T in it: T is normal, so the form is block diagonal up to rounding.
void split(const MatrixRM& t, const MatrixRM& vectors, const MatrixRM* second_moment,
           std::vector<InvariantSpace>& spaces) {
  const auto add = [&](const MatrixRM& columns) {
    spaces.push_back({columns, cost_a_column(t, columns, second_moment)});
  };
  const MatrixRM restricted = vectors.transpose() * t * vectors;
  const Eigen::RealSchur<MatrixRM> schur(restricted);
  const MatrixRM columns = vectors * schur.matrixU();
  int64_t reflection = -1;  // a vector with T v = -v that waits for another
  for (int64_t i = 0; i < columns.cols(); ++i) {
    if (i + 1 < columns.cols() && schur.matrixT()(i + 1, i) != 0) {
      add(columns.middleCols(i, 2));
      ++i;
    } else if (schur.matrixT()(i, i) > 0) {
      add(columns.col(i));
    } else if (reflection < 0) {
      reflection = i;
    } else {  // two reflections are a plane turned by pi
      MatrixRM plane(columns.rows(), 2);
      plane << columns.col(reflection), columns.col(i);
      add(plane);
      reflection = -1;
    }
  }
  if (reflection >= 0) add(columns.col(reflection));
}

// In order of falling cost; without weights only as many as fill r columns.
std::vector<InvariantSpace> invariant_spaces(const MatrixRM& t, int64_t r,
                                             const MatrixRM* second_moment) {
  // T + T^T has the eigenvalue 2 cos(theta) twice for each plane. Ascending: largest angles first.
  const Eigen::SelfAdjointEigenSolver<MatrixRM> eigen(t + t.transpose());
  const Eigen::VectorXd& values = eigen.eigenvalues();
  std::vector<InvariantSpace> spaces;
  const int64_t wanted = second_moment ? t.rows() : r;
  for (int64_t begin = 0, end = 1; begin < wanted; begin = end++) {
    while (end < t.rows() && values(end) - values(end - 1) < kCluster) ++end;
    split(t, eigen.eigenvectors().middleCols(begin, end - begin), second_moment, spaces);
  }
  std::stable_sort(spaces.begin(), spaces.end(),
                   [](const auto& a, const auto& b) { return a.cost > b.cost; });
  return spaces;
}

}  // namespace

MatrixRM SubspaceRotation::dense() const {
  return MatrixRM::Identity(u.rows(), u.rows()) + u * m * u.transpose();
}

SubspaceRotation low_rank_rotation(const MatrixRM& t, int64_t r, const MatrixRM* second_moment) {
  const int64_t n = t.rows();
  TQ_CHECK(t.cols() == n && r >= 0 && r <= n);
  TQ_CHECK(orthogonality_error(t) < 1e-6, "T is not orthogonal");
  TQ_CHECK(!second_moment || (second_moment->rows() == n && second_moment->cols() == n));
  SubspaceRotation result{MatrixRM(n, r), MatrixRM(r, r)};
  if (r == 0) return result;

  int64_t filled = 0;
  for (const InvariantSpace& space : invariant_spaces(t, r, second_moment)) {
    const int64_t taken = std::min<int64_t>(space.columns.cols(), r - filled);
    result.u.middleCols(filled, taken) = space.columns.leftCols(taken);
    filled += taken;
  }
  TQ_CHECK(filled == r);

  // Orthogonal already, up to rounding, unless r ends inside a plane. det R = det T, where needed
  // by turning round the direction that matters least.
  const MatrixRM sub = result.u.transpose() * t * result.u;
  const Eigen::BDCSVD<MatrixRM> svd(sub, Eigen::ComputeFullU | Eigen::ComputeFullV);
  MatrixRM left = svd.matrixU();
  result.m = left * svd.matrixV().transpose();
  if (result.m.determinant() * t.determinant() < 0) {
    left.col(r - 1) *= -1.0;
    result.m = left * svd.matrixV().transpose();
  }
  result.m.diagonal().array() -= 1.0;
  return result;
}

}  // namespace tq
