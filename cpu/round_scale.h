// round_scale - the numbers of one rounded group: its scale and what its codes are computed with.
//
// Shared by plain_round (ops.cpp) and lanes_round (lane_kernels.h), so that both follow one rule
// (docs/format.md, "Rounding of activations"). Internal to the including file, and no function of
// the standard library: those files are built for different processors.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace tq {
namespace {

struct RoundScale {
  float scale, inverse;  // x is about scale * code; code = round(x * inverse)
  float low, high;       // of the codes
};

/// largest: the greatest |x| of the group by bit pattern (NaN above infinity).
RoundScale round_scale(const RoundJob& job, float largest) {
  const float half = static_cast<float>(1 << (job.bits - 1));
  if (!job.full_range) {
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

}  // namespace
}  // namespace tq
