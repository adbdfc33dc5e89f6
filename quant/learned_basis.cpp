// learned_basis - the chain of bases and the folding of layers. See learned_basis.h.
#include "quant/learned_basis.h"

#include "model/error.h"
#include "quant/product.h"
#include "quant/stiefel.h"
#include "quant/subspace_rotation.h"

namespace tq {
namespace {

// I + U M U^T as x <- x + (x A^T) B^T: x U M U^T, so A = U^T and B = (M U^T)^T.
BasisStep make_step(const SubspaceRotation& rotation) {
  return {to_float(rotation.u.transpose()), to_float(rotation.u * rotation.m.transpose())};
}

// Which bases a linear reads and writes, relative to its layer; -1: none.
struct Ends {
  int64_t reads, writes;
};
constexpr Ends kEnds[kNLinears] = {{0, -1}, {0, -1}, {0, -1}, {-1, 1}, {1, -1}, {1, -1}, {-1, 2}};

}  // namespace

FloatMatrix to_float(const MatrixRM& m) {
  FloatMatrix w{m.rows(), m.cols(), {}};
  w.data.resize(static_cast<size_t>(m.size()));
  for (int64_t i = 0; i < m.size(); ++i) {
    w.data[static_cast<size_t>(i)] = static_cast<float>(m.data()[i]);
  }
  return w;
}

MatrixRM to_double(const FloatMatrix& m) {
  MatrixRM w(m.rows, m.cols);
  for (int64_t i = 0; i < w.size(); ++i) w.data()[i] = double{m.data[static_cast<size_t>(i)]};
  return w;
}

DeployedBasis::DeployedBasis(const LearnedBasis& learned, int64_t rank) {
  for (const MatrixRM& head : learned.heads) heads.push_back(to_float(head));
  MatrixRM current = learned.residual.front();
  residual.push_back(to_float(current));
  for (size_t i = 1; i < learned.residual.size(); ++i) {
    const int64_t n = current.rows();
    const SubspaceRotation step =
        low_rank_rotation(current.transpose() * learned.residual[i], std::min(rank, n));
    steps.push_back(make_step(step));
    current += current * step.u * step.m * step.u.transpose();
    current = nearest_orthogonal(current);
    residual.push_back(to_float(current));
  }
}

void rotate_columns_blockwise(FloatMatrix& w, const FloatMatrix& r, int threads) {
  TQ_CHECK(w.cols % r.rows == 0 && r.rows == r.cols);
  const int64_t rows = w.rows, cols = w.cols;
  w.rows = rows * (cols / r.rows);  // every block of columns as a row
  w.cols = r.rows;
  w = product_nn(w, r, threads);
  w.rows = rows;
  w.cols = cols;
}

void rotate_rows_blockwise(FloatMatrix& w, const FloatMatrix& r, int threads) {
  TQ_CHECK(w.rows % r.rows == 0 && r.rows == r.cols);
  const size_t block = static_cast<size_t>(r.rows * w.cols);
  for (auto begin = w.data.begin(); begin != w.data.end(); begin += static_cast<int64_t>(block)) {
    const auto end = begin + static_cast<int64_t>(block);
    const FloatMatrix part{r.rows, w.cols, {begin, end}};
    const FloatMatrix rotated = product_tn(r, part, threads);
    std::copy(rotated.data.begin(), rotated.data.end(), begin);
  }
}

void fold_into_basis(FloatLayer& layer, int64_t index, const DeployedBasis& basis, int threads) {
  for (int i = 0; i < kNLinears; ++i) {
    FloatMatrix& w = layer.linears[static_cast<size_t>(i)];
    if (kEnds[i].reads >= 0) w = product_nn(w, basis.at(2 * index + kEnds[i].reads), threads);
    if (kEnds[i].writes >= 0) w = product_tn(basis.at(2 * index + kEnds[i].writes), w, threads);
  }
  const FloatMatrix& heads = basis.heads[static_cast<size_t>(index)];
  rotate_rows_blockwise(layer.linears[kWv], heads, threads);
  rotate_columns_blockwise(layer.linears[kWo], heads, threads);
}

void fold_branch(LowRank& branch, LinearIndex linear, int64_t index, const DeployedBasis& basis,
                 int threads) {
  const Ends& ends = kEnds[linear];
  if (ends.reads >= 0) branch.a = product_nn(branch.a, basis.at(2 * index + ends.reads), threads);
  if (ends.writes >= 0) branch.b = product_tn(basis.at(2 * index + ends.writes), branch.b, threads);
  const FloatMatrix& heads = basis.heads[static_cast<size_t>(index)];
  if (linear == kWv) rotate_rows_blockwise(branch.b, heads, threads);
  if (linear == kWo) rotate_columns_blockwise(branch.a, heads, threads);
}

}  // namespace tq
