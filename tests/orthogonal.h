// orthogonal - a random orthogonal matrix, for tests of rotated models.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "quant/rng.h"

namespace tq {

/// [n, n] row-major, orthogonal to f64: Gaussian rows, Gram and Schmidt twice.
inline std::vector<double> random_orthogonal(int64_t n, uint64_t seed) {
  SplitMix64 rng(seed);
  std::vector<double> m(static_cast<size_t>(n * n));
  for (double& x : m) x = rng.normal();
  for (int64_t i = 0; i < n; ++i) {
    double* row = m.data() + i * n;
    const auto dot_with = [&](const double* other) {
      double dot = 0;
      for (int64_t k = 0; k < n; ++k) dot += row[k] * other[k];
      return dot;
    };
    for (int64_t j = 0; j < 2 * i; ++j) {
      const double* other = m.data() + j % i * n;
      const double dot = dot_with(other);
      for (int64_t k = 0; k < n; ++k) row[k] -= dot * other[k];
    }
    const double length = std::sqrt(dot_with(row));
    for (int64_t k = 0; k < n; ++k) row[k] /= length;
  }
  return m;
}

}  // namespace tq
