// hadamard - Hadamard matrices of order m * 2^k and the orders we can build.
//
// Mathematics only, shared by every backend and by the quantizer. The fast transform itself is
// cpu/hadamard.h. Sources: Paley 1933, Goethals and Seidel 1967; the choice of orders is
// docs/method.md.
#pragma once

#include <cstdint>
#include <vector>

namespace tq {

/// The base order m in n = m * 2^k: 1, or one of
/// 12, 20, 28, 36, 60, 68, 76, 100, 108, 140, 148, 156, 172. 0 if n has no such factorisation.
/// The smallest m is preferred (more butterflies, less dense work).
int64_t hadamard_base_order(int64_t n);

/// The largest block that divides n and is itself buildable (n when hadamard_base_order(n) != 0).
int64_t hadamard_block(int64_t n);

/// Entries +1/-1 of the base matrix of order m, row-major [m, m], H H^T = m I. Paley I for
/// m - 1 prime power = 3 mod 4, Paley II for m/2 - 1 prime power = 1 mod 4 (GF(p^k) included), a
/// Goethals-Seidel array for 156 and 172. Not symmetric in general: the inverse is H^T / m.
/// The matrix of order m * 2^k is H_m (x) H_2 (x) ... (x) H_2.
const std::vector<int8_t>& hadamard_base(int64_t m);

}  // namespace tq
