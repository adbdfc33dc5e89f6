// act_codes - which integers the codes of a rounded input are (docs/format.md, "Rounding of
// activations").
//
// No inline function here: files built for one instruction set include it (cpu/exp_constants.h).
#pragma once

#include <cstdint>

namespace tq {

enum class ActCodes : uint8_t {
  kSymmetric,  // -(2^(bits-1) - 1) .. 2^(bits-1) - 1; scale = max|x| * clip / (2^(bits-1) - 1)
  kAll,        // from -2^(bits-1) on: the first x of the largest magnitude gets the lowest code,
               // scale = -x * clip / 2^(bits-1), which may be negative
  kAsymmetric  // from min(0, x) to max(0, x) in 2^bits - 1 steps, shifted so that 0 has the code 0:
               // -z .. 2^bits - 1 - z with z of the group; 3 and 4 bits, where |code| <= 15
};

/// Of two-level scales (ActQuant; quant/rounding.h): the finest scale is a fifteenth of the
/// largest. Codes of -8..7 times a multiple fit a byte.
constexpr int kMostMultiple = 15;

}  // namespace tq
