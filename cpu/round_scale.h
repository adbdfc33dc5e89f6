// round_scale - the numbers of one rounded group: its scale and what its codes are computed with.
//
// Shared by plain_round (ops.cpp) and lanes_round (lane_kernels.h), so that both follow one rule
// (docs/format.md, "Rounding of activations"). Internal to the including file, and no function of
// the standard library: those files are built for different processors.
#pragma once

#include <cstdint>

#include "cpu/exp_constants.h"
#include "cpu/kernels.h"
#include "model/act_codes.h"

namespace tq {
namespace {

struct RoundScale {
  float scale, inverse;  // x is about scale * code; code = round(x * inverse)
  float low, high;       // of the codes
};

/// What the scale of a group depends on.
struct GroupReach {
  float largest;               // |x| by bit pattern (NaN above infinity)
  float above = 0, below = 0;  // the greatest x and -x, not below 0 (asymmetric codes)
};

RoundScale free_scale(const RoundJob& job, const GroupReach& reach) {
  const float half = static_cast<float>(1 << (job.bits - 1)), largest = reach.largest;
  if (job.act_codes == ActCodes::kAsymmetric) {
    const float steps = 2 * half - 1, below = reach.below * job.clip;
    const float range = largest != largest ? largest : reach.above * job.clip + below;
    const float inverse = range > 0 ? steps / range : 0.0f, place = below * inverse;
    const float zero = ((place < steps ? place : steps) + kRoundMagic) - kRoundMagic;
    return {range / steps, inverse, -zero, steps - zero};
  }
  if (job.act_codes == ActCodes::kSymmetric) {
    const float amax = largest * job.clip;
    return {amax / (half - 1), amax > 0 ? (half - 1) / amax : 0.0f, 1 - half, half - 1};
  }
  // The first element of that magnitude becomes the lowest code: with its sign turned the scale is
  // the one that wastes no code.
  const uint32_t magnitude = __builtin_bit_cast(uint32_t, largest);
  int64_t i = 0;
  while (i + 1 < job.count && (__builtin_bit_cast(uint32_t, job.x[i]) & 0x7FFFFFFFu) != magnitude)
    ++i;
  const float a = job.x[i] * job.clip;
  return {-a / half, a < 0 || a > 0 ? half / -a : 0.0f, -half, half - 1};
}

RoundScale round_scale(const RoundJob& job, const GroupReach& reach) {
  RoundScale by = free_scale(job, reach);
  if (job.unit == 0) return by;
  const float wanted = by.scale / job.unit;
  float multiple = ((wanted < 0 ? -wanted : wanted) + kRoundMagic) - kRoundMagic;
  multiple = multiple > 1 ? multiple : 1.0f;
  if (multiple > kMostMultiple) multiple = kMostMultiple;
  by.scale = (wanted < 0 ? -multiple : multiple) * job.unit;
  by.inverse = 1 / by.scale;
  return by;
}

}  // namespace
}  // namespace tq
