// autodiff_rounding - rounding to few bits on a tape, as the packed weights and tokens will do it.
//
// The value is scale * code, with the scale and the code that the runtime computes, bit for bit
// (ops.h, plain_round). The true slope of a rounding is 0 almost everywhere; the gradients here
// take d rint(v) / dv = 1 inside the range of codes and 0 outside. Source: straight-through
// estimator (Bengio et al. 2013), learned scales (LSQ, Esser et al. 2020).
// Read next: autodiff_rounding.cpp.
#pragma once

#include "cpu/autodiff.h"
#include "model/weights.h"

namespace tq {

/// Groups of `group` consecutive columns share a scale; the last group of a row may be short.
struct GroupRounding {
  int bits = 4;        // 2 to 8
  int64_t group = 64;  // columns
  ActCodes codes = ActCodes::kSymmetric;
  float clip = 1.0f;
  // Scales of a row are whole multiples of one number (ActQuant). The gradient is that of scales
  // without this restriction.
  bool two_level = false;
};

enum class RoundGradient {
  kStraightThrough,  // scales are constants
  kWithScale,        // and the exact gradient through the scale to the elements that set it
};

/// Fake quantization along rows.
Var round_groups(const Var& x, const GroupRounding& rounding,
                 RoundGradient kind = RoundGradient::kWithScale);
/// Same with a learned clip [1, 1, 1] in place of rounding.clip; its gradient is exact.
Var round_groups(const Var& x, const GroupRounding& rounding, const Var& clip,
                 RoundGradient kind = RoundGradient::kWithScale);

/// scales [rows, n_groups] of w [rows, cols] as operands of their own: codes =
/// clamp(rint(w / scale), -2^(bits-1), 2^(bits-1) - 1), exact gradient of the scales. A scale of 0
/// gives 0.
Var round_with_scales(const Var& w, const Var& scales, int bits, int64_t group);

/// scale * code of a packed matrix [rows, cols] whose scales [rows, n_groups] are an operand; the
/// codes are fixed. `packed` outlives the tape; its own scales are not read.
Var scale_codes(const Matrix& packed, const Var& scales);

}  // namespace tq
