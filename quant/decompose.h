// decompose - a low-rank component in 16, 8 or 4 bits beside the rounded residual.
//
// W = B A + R with A [rank, in], B [out, rank]: the best rank-r approximation in the Frobenius norm
// (SVDQuant, Li et al. 2025, without its smoothing), energy split evenly between A and B. The
// residual is taken from the factors as stored, so it also corrects their rounding.
// Not here: the rounding of R (rounding.h). Read next: calibrate.h.
#pragma once

#include <cstdint>

#include "quant/owned.h"
#include "quant/rounding.h"

namespace tq {

struct LowRank {
  FloatMatrix a;  // [rank, in]
  FloatMatrix b;  // [out, rank]
};

/// Leading `rank` singular triplets of w as B = U sqrt(S), A = sqrt(S) V^T. Randomised subspace
/// iteration (Halko, Martinsson, Tropp 2011) in f64 with a fixed start, so reproducible; its error
/// exceeds the optimum by a few parts in 10^4 even on flat spectra. rank <= min(rows, cols).
LowRank truncated_svd(const FloatMatrix& w, int64_t rank);

struct Decomposed {
  OwnedMatrix a, b;
  FloatMatrix residual;  // w - stored(b) stored(a)
};

/// Splits w. branch: how the factors are stored; 16 bits: f16.
Decomposed decompose(const FloatMatrix& w, int64_t rank, const RoundingSpec& branch);

/// w - b a, in f64, rounded once.
FloatMatrix subtract_product(const FloatMatrix& w, const FloatMatrix& b, const FloatMatrix& a);

}  // namespace tq
