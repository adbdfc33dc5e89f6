// branch - reduced-rank regression and the rounding of factors. See branch.h.
#include "quant/branch.h"

#include <algorithm>

#include "model/error.h"
#include "quant/eigen.h"
#include "quant/gl.h"
#include "quant/learned_basis.h"
#include "quant/magnitude.h"
#include "quant/product.h"
#include "quant/rng.h"
#include "quant/rounding.h"
#include "quant/stiefel.h"

namespace tq {
namespace {

// Extra directions and rounds of the subspace iteration. The error's spectrum decays slowly, so
// directions separate slowly, and one that is missed costs little.
constexpr int64_t kOversampling = 8;
constexpr int kRounds = 4;
// Of G. Its spectrum follows that of the branch; beyond this the weakest directions are noise.
constexpr double kMaxCondition = 1000;

// The upper triangle of H as a full f32 matrix.
FloatMatrix full_gram(const Gram& gram) {
  const int64_t n = gram.size();
  FloatMatrix h{n, n, std::vector<float>(static_cast<size_t>(n * n))};
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) h.row(i)[j] = static_cast<float>(gram.at(i, j));
  }
  return h;
}

// U [out, rank]: leading eigenvectors of E H E^T, by subspace iteration from a fixed start.
FloatMatrix leading_directions(const FloatMatrix& error, const FloatMatrix& h, int64_t rank,
                               int threads) {
  const int64_t width = std::min(rank + kOversampling, error.rows);
  MatrixRM start(error.rows, width);
  SplitMix64 rng(0x7157, static_cast<uint64_t>(width));
  for (int64_t i = 0; i < start.size(); ++i) start.data()[i] = rng.normal();
  FloatMatrix basis = to_float(orthonormalise(start));
  for (int round = 0;; ++round) {
    // E H E^T basis, from the right.
    const FloatMatrix back = product_tn(error, basis, threads);  // [in, width]
    const FloatMatrix weighted = product_nn(h, back, threads);   // [in, width]
    if (round == kRounds) {
      const MatrixRM small = to_double(product_tn(back, weighted, threads));
      const Eigen::SelfAdjointEigenSolver<MatrixRM> eigen((small + small.transpose()) / 2);
      return to_float(to_double(basis) * eigen.eigenvectors().rightCols(rank));
    }
    basis = to_float(orthonormalise(to_double(product_nn(error, weighted, threads))));
  }
}

}  // namespace

void balance_branch(LowRank& factors, const MatrixRM& narrow, int threads) {
  const MatrixRM wide =
      to_double(product_tn(factors.b, factors.b, threads)) / static_cast<double>(factors.b.rows);
  const MatrixRM g = closed_form_gauge((narrow + narrow.transpose()) / 2,
                                       (wide + wide.transpose()) / 2, kMaxCondition, 0, 0);
  factors.a = to_float(g * to_double(factors.a));
  factors.b = to_float(to_double(factors.b) * g.inverse());
}

FittedBranch round_branch(const LowRank& given, const FloatMatrix& target, const SiteStats& stats,
                          const GptqFactor& factor, const BranchSpec& spec) {
  LowRank factors = given;
  balance_powers(factors);
  FittedBranch result;
  const RoundingSpec rounding{spec.bits, spec.group, spec.two_level};
  result.a = round_matrix(factors.a, rounding, &factor, spec.threads).matrix;

  // The narrow input as the runtime will round it: groups of B, no clip (cpu/linear.cpp).
  FloatMatrix h = product_nt(stats.rounded(), to_float_matrix(result.a.view()), spec.threads);
  const ActQuant act = stats.act().narrow(h.cols, spec.group);
  const FloatMatrix unrounded = h;
  round_tokens(unrounded.data.data(), h.rows, h.cols, act, h.data.data(), spec.threads);
  Gram gram(h.cols);
  gram.add(h.data.data(), h.rows, spec.threads);
  const GptqFactor narrow = factorize(gram, spec.threads, "low-rank branch");

  // B' (h^T h + damping) = T (X'^T h) + damping B: least squares for the target, drawn towards B.
  const FloatMatrix cross = product_tn(stats.rounded(), h, spec.threads);  // [in, rank]
  FloatMatrix b = product_nn(target, cross, spec.threads);
  for (size_t i = 0; i < b.data.size(); ++i) {
    b.data[i] += static_cast<float>(narrow.damping) * factors.b.data[i];
  }
  b = solve_right(b, narrow, spec.threads);
  result.b = round_matrix(b, rounding, &narrow, spec.threads).matrix;

  // What the branch puts out, regressed on X' and drawn towards B' A', which it is where inputs
  // say little: B' (h^T X' + damping A') (H + damping)^-1.
  FloatMatrix transposed = to_float_matrix(result.a.view());
  for (int64_t i = 0; i < cross.rows; ++i) {
    for (int64_t j = 0; j < cross.cols; ++j) {
      float& value = transposed.row(j)[i];
      value = cross.row(i)[j] + static_cast<float>(factor.damping) * value;
    }
  }
  result.seen = product_nn(to_float_matrix(result.b.view()),
                           solve_right(transposed, factor, spec.threads), spec.threads);
  return result;
}

FittedBranch fit_branch(const FloatMatrix& error, const SiteStats& stats, const GptqFactor& factor,
                        const BranchSpec& spec) {
  const FloatMatrix h = full_gram(stats.gram());
  LowRank factors;
  factors.b = leading_directions(error, h, spec.rank, spec.threads);
  factors.a = product_tn(factors.b, error, spec.threads);
  const FloatMatrix ha = product_nt(h, factors.a, spec.threads);  // [in, rank]
  balance_branch(factors,
                 to_double(product_nn(factors.a, ha, spec.threads)) /
                     static_cast<double>(stats.rounded().rows),
                 spec.threads);
  return round_branch(factors, error, stats, factor, spec);
}

}  // namespace tq
