// hadamard - see hadamard.h. Constructions: Paley I and II (1933) over GF(p) and GF(49), and two
// Goethals-Seidel arrays (1967) for the orders that Paley does not reach, 156 and 172.
#include "model/hadamard.h"

#include <algorithm>
#include <array>
#include <map>

#include "model/error.h"

namespace tq {
namespace {

using Square = std::vector<int8_t>;

// A field of q elements, q a prime or 49 = GF(7)[i], i^2 = -1 (7 is 3 mod 4, so -1 is no square).
// Elements are numbers 0..q-1; a + 7 b stands for a + b i.
struct Field {
  int q;
  bool square_of_seven() const { return q == 49; }
  int subtract(int x, int y) const {
    if (!square_of_seven()) return (x - y + q) % q;
    return (x % 7 - y % 7 + 7) % 7 + 7 * ((x / 7 - y / 7 + 7) % 7);
  }
  int multiply(int x, int y) const {
    if (!square_of_seven()) return x * y % q;
    const int a = x % 7, b = x / 7, c = y % 7, d = y / 7;
    return (a * c + 6 * b * d) % 7 + 7 * ((a * d + b * c) % 7);
  }
  // 0, 1 for non-zero squares, -1 for the others.
  std::vector<int8_t> quadratic_character() const {
    std::vector<int8_t> chi(static_cast<size_t>(q), -1);
    chi[0] = 0;
    for (int x = 1; x < q; ++x) chi[static_cast<size_t>(multiply(x, x))] = 1;
    return chi;
  }
};

// The bordered matrix [[0, 1], [border, Q]] with Q[i][j] = chi(i - j), order q + 1.
Square bordered_character_matrix(int q, int8_t border) {
  const Field field{q};
  const std::vector<int8_t> chi = field.quadratic_character();
  const int n = q + 1;
  Square s(static_cast<size_t>(n * n), 0);
  for (int i = 1; i < n; ++i) {
    s[static_cast<size_t>(i)] = 1;
    s[static_cast<size_t>(i * n)] = border;
    for (int j = 1; j < n; ++j) {
      s[static_cast<size_t>(i * n + j)] = chi[static_cast<size_t>(field.subtract(i - 1, j - 1))];
    }
  }
  return s;
}

// q = 3 mod 4: I + S with S skew, order q + 1.
Square paley_one(int q) {
  Square h = bordered_character_matrix(q, -1);
  for (int i = 0; i <= q; ++i) h[static_cast<size_t>(i * (q + 1) + i)] = 1;
  return h;
}

// q = 1 mod 4: C (x) [1 1; 1 -1] + I (x) [1 -1; -1 -1] with C symmetric, order 2 (q + 1).
Square paley_two(int q) {
  const Square c = bordered_character_matrix(q, 1);
  const int half = q + 1, n = 2 * half;
  Square h(static_cast<size_t>(n * n));
  for (int i = 0; i < half; ++i) {
    for (int j = 0; j < half; ++j) {
      const int8_t v = c[static_cast<size_t>(i * half + j)];
      const bool diagonal = i == j;  // where C is 0
      const int8_t block[4] = {diagonal ? int8_t{1} : v, diagonal ? int8_t{-1} : v,
                               diagonal ? int8_t{-1} : v,
                               diagonal ? int8_t{-1} : static_cast<int8_t>(-v)};
      for (int k = 0; k < 4; ++k) {
        h[static_cast<size_t>((2 * i + k / 2) * n + 2 * j + k % 2)] = block[k];
      }
    }
  }
  return h;
}

// Four +-1 sequences of period t whose power spectra add up to 4 t at every frequency make a
// Hadamard matrix of order 4 t. Each is constant on the orbits of x -> multiplier * x mod t; bit i
// of its mask makes orbit i (numbered by smallest element) negative. The masks were found by a
// search over all orbit-constant sequences, matching pairs of spectra.
struct GoethalsSeidel {
  int t, multiplier;
  std::array<int, 4> masks;
};

std::vector<int8_t> orbit_sequence(const GoethalsSeidel& gs, int mask) {
  std::vector<int8_t> sequence(static_cast<size_t>(gs.t), 0);
  int orbit = 0;
  for (int start = 0; start < gs.t; ++start) {
    if (sequence[static_cast<size_t>(start)] != 0) continue;
    const int8_t value = mask >> orbit & 1 ? -1 : 1;
    int x = start;
    do {
      sequence[static_cast<size_t>(x)] = value;
      x = x * gs.multiplier % gs.t;
    } while (x != start);
    ++orbit;
  }
  return sequence;
}

// With circulants A, B, C, D and the reversal R:
//    A     B R    C R    D R
//   -B R   A      D'R   -C'R
//   -C R  -D'R    A      B'R
//   -D R   C'R   -B'R    A        (X' = transpose of X)
Square goethals_seidel(const GoethalsSeidel& gs) {
  const int t = gs.t, n = 4 * t;
  std::array<std::vector<int8_t>, 4> row;
  for (size_t k = 0; k < 4; ++k) row[k] = orbit_sequence(gs, gs.masks[k]);
  // Entry (i, j) of circulant k is row[k][j - i]; times R, column j becomes t - 1 - j; transposed,
  // the sign of the difference flips.
  struct Cell {
    size_t k;
    int sign;
    bool reversed, transposed;
  };
  static constexpr Cell kArray[4][4] = {
      {{0, 1, false, false}, {1, 1, true, false}, {2, 1, true, false}, {3, 1, true, false}},
      {{1, -1, true, false}, {0, 1, false, false}, {3, 1, true, true}, {2, -1, true, true}},
      {{2, -1, true, false}, {3, -1, true, true}, {0, 1, false, false}, {1, 1, true, true}},
      {{3, -1, true, false}, {2, 1, true, true}, {1, -1, true, true}, {0, 1, false, false}}};
  Square h(static_cast<size_t>(n * n));
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      const Cell& cell = kArray[i / t][j / t];
      const int col = cell.reversed ? t - 1 - j % t : j % t;
      const int difference = cell.transposed ? i % t - col : col - i % t;
      h[static_cast<size_t>(i * n + j)] =
          static_cast<int8_t>(cell.sign * row[cell.k][static_cast<size_t>((difference + t) % t)]);
    }
  }
  return h;
}

std::map<int64_t, Square> build_bases() {
  std::map<int64_t, Square> bases;
  bases[1] = {1};
  for (int q : {11, 19, 59, 67, 107, 139}) bases[q + 1] = paley_one(q);
  for (int q : {13, 17, 37, 49, 73}) bases[2 * (q + 1)] = paley_two(q);
  bases[156] = goethals_seidel({39, 16, {903, 1831, 1118, 5092}});
  bases[172] = goethals_seidel({43, 6, {3853, 5782, 471, 3729}});
  return bases;
}

const std::map<int64_t, Square>& bases() {
  static const std::map<int64_t, Square> all = build_bases();
  return all;
}

}  // namespace

int64_t hadamard_base_order(int64_t n) {
  if (n <= 0) return 0;
  for (const auto& [order, base] : bases()) {
    if (n % order != 0) continue;
    const int64_t rest = n / order;
    if ((rest & (rest - 1)) == 0) return order;
  }
  return 0;
}

int64_t hadamard_block(int64_t n) {
  int64_t best = 1;
  for (const auto& [order, base] : bases()) {
    if (n <= 0 || n % order != 0) continue;
    const int64_t rest = n / order;
    best = std::max(best, order * (rest & -rest));  // all factors of two that are left
  }
  return best;
}

const std::vector<int8_t>& hadamard_base(int64_t m) {
  const auto it = bases().find(m);
  TQ_CHECK(it != bases().end(), "not a base order");
  return it->second;
}

}  // namespace tq
