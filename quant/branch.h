// branch - a low-rank component fitted to what the rounding of the rest leaves over.
//
// With R' the rounded residual of a target T, the outputs miss X' E^T, E = T - R'. The best rank-r
// L for ||X' (E - L)^T|| is U U^T E, where U [out, r] spans the leading left singular vectors of
// E H^(1/2) (reduced-rank regression; H = X'^T X'). Stored are B A = L in few bits, with G in GL(r)
// between the factors chosen in closed form so that their roundings, and that of the narrow input
// X' A^T, hurt least (gl.h, closed_form_gauge): A <- G U^T E, B <- U G^-1. Then A is rounded by
// GPTQ in the metric H, B is fitted again by least squares to the narrow input as it will be
// rounded, and rounded by GPTQ in that input's metric. Not here: branches by SVD (decompose.h).
// Read next: branch.cpp.
#pragma once

#include "quant/decompose.h"
#include "quant/eigen.h"
#include "quant/site_stats.h"

namespace tq {

struct FittedBranch {
  OwnedMatrix a, b;  // packed: [rank, in], [out, rank]
  FloatMatrix seen;  // [out, in]: W such that X' W^T is what the branch puts out, least squares
                     // drawn towards B A
};

struct BranchSpec {
  int64_t rank;
  int bits;       // of the factors: 4 or 8
  int64_t group;  // columns per scale
  bool two_level;
  int threads;
};

/// error: E [out, in]. stats, factor: of the linear's site.
FittedBranch fit_branch(const FloatMatrix& error, const SiteStats& stats, const GptqFactor& factor,
                        const BranchSpec& spec);

/// A <- G A, B <- B G^-1 with the closed-form G. narrow: second moment of x A^T, [rank, rank].
void balance_branch(LowRank& factors, const MatrixRM& narrow, int threads);

/// Rounds given factors the same way; B is fitted again so that X' and the rounding of the narrow
/// input give the outputs X' target^T best.
FittedBranch round_branch(const LowRank& factors, const FloatMatrix& target, const SiteStats& stats,
                          const GptqFactor& factor, const BranchSpec& spec);

}  // namespace tq
