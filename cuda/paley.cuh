// paley - signs of the Hadamard matrices of order 12, 20, 28 and 36, known when a kernel is
// compiled: a product with one is additions and subtractions, nothing is loaded.
//
// The same matrices as model/hadamard.h (Paley 1933), which has the other orders too.
#pragma once

#include <cstdint>

namespace tq::cuda {

/// Bit `to` of row[from] is set where element `from` is subtracted from sum `to`.
template <int kM>
struct PaleySigns {
  uint64_t row[kM] = {};
  constexpr PaleySigns() {
    for (int i = 0; i < kM; ++i) {
      for (int j = 0; j < kM; ++j) row[i] |= uint64_t{negative(i, j)} << j;
    }
  }

 private:
  static constexpr bool kFirst = kM == 12 || kM == 20;  // Paley I; else II
  static constexpr int kQ = kFirst ? kM - 1 : kM / 2 - 1;

  // 1 for squares modulo q, -1 for others, 0 for 0.
  static constexpr int character(int x) {
    const int residue = (x % kQ + kQ) % kQ;
    if (residue == 0) return 0;
    for (int y = 1; y < kQ; ++y) {
      if (y * y % kQ == residue) return 1;
    }
    return -1;
  }
  static constexpr bool negative(int i, int j) {
    if constexpr (kM == 1) return false;
    if constexpr (kFirst) {
      if (i == j || i == 0) return false;
      return j == 0 || character(i - j) < 0;
    }
    const int a = i / 2, b = j / 2;
    if (a == b) return i % 2 == 1 || j % 2 == 1;
    const int c = a == 0 || b == 0 ? 1 : character(a - b);
    return (i % 2 == 1 && j % 2 == 1 ? -c : c) < 0;
  }
};

}  // namespace tq::cuda
