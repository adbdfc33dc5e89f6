// rounding - a real matrix to 3-, 4- or 8-bit codes with one f16 scale per group of columns.
//
// Two ways, one walk over the columns: to nearest (RTN), or GPTQ, which pushes the error of every
// column into the columns not yet rounded. Not here: the second-moment matrix that GPTQ needs
// (gptq.h), the choice of basis (rotation.h). Read next: gptq.h.
#pragma once

#include <cstdint>
#include <span>

#include "quant/owned.h"

namespace tq {

struct GptqFactor;

/// value = scale * code; codes -4..3 (3 bits, stored as 4), -8..7 (4 bits) or -127..127 (8 bits).
/// Three bits save no space: they are a stress test for methods.
struct RoundingSpec {
  int bits = 4;  // 3, 4 or 8
  int64_t group =
      64;  // columns per scale: a multiple of 32 that divides 128; the last may be short
  // 3 and 4 bits: a row's scales are whole multiples, 1 to kMostMultiple, of one f16 number of 7
  // significant bits, so that they are f16 numbers themselves and the row is one number times
  // integers of a byte. (As K-quants of llama.cpp and QServe, Lin et al. 2024, have them.)
  bool two_level = false;
};

/// The unit nearest to a number: an f16 number of 7 significant bits.
float round_unit(float unit);
/// The largest number that f16 scales are whole multiples of, for example a row's two-level ones.
float common_unit(std::span<const float> scales);

struct Rounded {
  OwnedMatrix matrix;
  int64_t n_clipped = 0;  // weights more than half a step outside the range of codes
};

/// Rounds w. Each group's scale minimises the squared error over a grid of shrunken ranges (what
/// the tail loses, the bulk gains), then is rounded to f16, and only then codes are computed.
/// factor: null rounds to nearest; otherwise GPTQ (Frantar et al. 2023, arXiv 2210.17323), with
/// scales found when a group is entered, on the weights as updated by then. The factor's order
/// keeps groups of spec.group together. The result does not depend on `threads`. Values must be
/// finite.
Rounded round_matrix(const FloatMatrix& w, const RoundingSpec& spec, const GptqFactor* factor,
                     int threads);

}  // namespace tq
