// magnitude - powers of two taken out of weights, so that numbers in f16 can hold what is left.
//
// A group's scale is an f16 number: coarse below 2^-14, zero below 2^-24, at most 65504. Weights of
// ordinary models stay far inside. Others (a linear scaled down where the next is scaled up, a
// layer that training or merging has shrunk) lose a power of two first, which the runtime
// multiplies the linear's output by (Linear::exponents): the rest quantizes like the same matrix of
// ordinary magnitude, to the same codes. Two steps, because folding mixes rows of a linear: one
// power for a whole matrix before, one for a row where that is not enough after. Not here: the
// rounding. Read next: magnitude.cpp.
#pragma once

#include "quant/decompose.h"
#include "quant/owned.h"
#include "quant/rounding.h"

namespace tq {

/// Takes one power of two out of each linear whose largest weight is far from ordinary, into
/// layer.exponents. Call it once the norm gains are folded, before any basis.
void take_out_powers(FloatLayer& layer, int threads);

/// Powers of two, one a row, that w must lose so that scales of `spec` can hold it; empty where
/// they can as it is. `taken`: what w has lost already, [rows] or empty; the sum is a valid
/// exponent. A group that is 2^28 below the largest of its row is rounded to zeros all the same:
/// sums in f32 lose it too. tolerated: the share of rows that may not fit.
std::vector<int8_t> row_exponents(const FloatMatrix& w, const RoundingSpec& spec,
                                  const std::vector<int8_t>& taken, int threads,
                                  double tolerated = 0);

/// Row i of w <- 2^(sign * exponents[i]) row i.
void scale_rows(FloatMatrix& w, const std::vector<int8_t>& exponents, int sign, int threads);

/// The power of two, an even one, that inputs x would lose to be of ordinary magnitude; 0 where
/// they are. Squares of others leave f32, and whatever is made of all of them is the same for 2^-e
/// x.
int input_exponent(std::span<const float> x);

/// A <- 2^t A, B <- 2^-t B with t such that both are of one magnitude, where scales could not hold
/// one of them as it is: the product stays the same, exactly.
void balance_powers(LowRank& factors);

}  // namespace tq
