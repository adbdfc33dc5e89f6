// exp_constants - the polynomial of exp(x) that every instruction set evaluates, step by step
// alike.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, exp(x) = 2^n exp(r), exp(r) = 1 + r + r^2 q(r) with q of
// degree 4 interpolated at Chebyshev nodes (relative error of the polynomial 1e-8). n comes out of
// adding 1.5 * 2^23, whose unit in the last place is 1; the low bits of that sum are n itself.
// Constants only: no inline function here, so that no file built for one instruction set can emit
// code that another one is linked to.
#pragma once

namespace tq {

constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLn2High = 0x1.62e400p-1f;  // few bits, so that n * kLn2High is exact
constexpr float kLn2Low = 0x1.7f7d1cp-20f;
constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23
constexpr float kExpQ[5] = {0x1.0p-1f, 0x1.5554dep-3f, 0x1.55551ap-5f, 0x1.120b62p-7f,
                            0x1.6d10fcp-10f};
constexpr float kExpMin = -86.0f;  // smaller x give 0 (exp is 4.5e-38 there, the last normal ones)
constexpr float kExpMax = 88.0f;   // larger x give infinity (exp is 1.7e38 there)
constexpr float kInfinity = __builtin_inff();

}  // namespace tq
