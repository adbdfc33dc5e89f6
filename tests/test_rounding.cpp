// Rounding to codes, the clip search, GPTQ and its Gram matrix.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "model/error.h"
#include "quant/gptq.h"
#include "quant/rng.h"
#include "quant/rounding.h"
#include "quant/site_stats.h"

namespace tq {
namespace {

FloatMatrix make(int64_t rows, int64_t cols, std::vector<float> values) {
  return {rows, cols, std::move(values)};
}

FloatMatrix random_matrix(int64_t rows, int64_t cols, uint64_t seed) {
  SplitMix64 rng(seed);
  FloatMatrix w = make(rows, cols, std::vector<float>(static_cast<size_t>(rows * cols)));
  for (float& value : w.data) value = static_cast<float>(rng.normal());
  return w;
}

// Inputs with strong correlations: a few hidden factors plus noise.
FloatMatrix correlated_inputs(int64_t tokens, int64_t n, uint64_t seed) {
  const FloatMatrix factors = random_matrix(tokens, 4, seed);
  const FloatMatrix mixing = random_matrix(4, n, seed + 1);
  FloatMatrix x = random_matrix(tokens, n, seed + 2);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < n; ++j) {
      float& value = x.row(t)[j];
      value *= 0.3f;
      for (int64_t f = 0; f < 4; ++f) value += factors.row(t)[f] * mixing.row(f)[j];
    }
  }
  return x;
}

double squared_error(const FloatMatrix& a, const FloatMatrix& b) {
  double total = 0;
  for (size_t i = 0; i < a.data.size(); ++i) {
    total += (double{a.data[i]} - b.data[i]) * (double{a.data[i]} - b.data[i]);
  }
  return total;
}

double output_error(const FloatMatrix& w, const OwnedMatrix& rounded, const Gram& gram) {
  FloatMatrix difference = to_float_matrix(rounded.view());
  for (size_t i = 0; i < w.data.size(); ++i) difference.data[i] -= w.data[i];
  return output_energy(difference, gram, 1);
}

TEST(Rounding, ReproducesValuesThatLieOnTheGrid) {
  // Scale 1/4 is a candidate (largest 7/4, unclipped) and gives no error at all.
  std::vector<float> values(32);
  for (int i = 0; i < 32; ++i)
    values[static_cast<size_t>(i)] = 0.25f * static_cast<float>(i % 15 - 7);
  const FloatMatrix w = make(1, 32, values);
  const Rounded rounded = round_matrix(w, {4, 32}, nullptr, 1);
  EXPECT_EQ(to_float_matrix(rounded.matrix.view()).data, w.data);
  EXPECT_EQ(rounded.n_clipped, 0);
  EXPECT_EQ(packed_code(rounded.matrix.view(), 0, 0), -7);
  EXPECT_EQ(packed_code(rounded.matrix.view(), 0, 14), 7);
}

TEST(Rounding, ThreeBitsAreTheCodesFromMinusFourToThree) {
  // On the grid: scale 1/4 (largest 3/4, unclipped) gives no error. -1 is the code -4.
  std::vector<float> values(32);
  for (int i = 0; i < 32; ++i)
    values[static_cast<size_t>(i)] = 0.25f * static_cast<float>(i % 7 - 3);
  const FloatMatrix grid = make(1, 32, values);
  const Rounded exact = round_matrix(grid, {3, 32}, nullptr, 1);
  EXPECT_EQ(exact.matrix.storage, Storage::kQ4);
  EXPECT_EQ(to_float_matrix(exact.matrix.view()).data, grid.data);
  // Random ones: every code of the eight occurs, none beyond.
  const Rounded rounded = round_matrix(random_matrix(32, 128, 5), {3, 64}, nullptr, 1);
  int count[16] = {};
  for (int64_t row = 0; row < 32; ++row) {
    for (int64_t col = 0; col < 128; ++col) {
      ++count[packed_code(rounded.matrix.view(), row, col) + 8];
    }
  }
  for (int code = -8; code < 8; ++code) {
    EXPECT_EQ(count[code + 8] > 0, -4 <= code && code <= 3) << code;
  }
}

TEST(Rounding, CodesAreTheNearestIntegersToTheStoredScale) {
  for (int bits : {4, 8}) {
    const FloatMatrix w = random_matrix(21, 200, 3);  // ragged rows, ragged last group
    const OwnedMatrix rounded = round_matrix(w, {bits, 64}, nullptr, 1).matrix;
    const Matrix view = rounded.view();
    ASSERT_EQ(view.n_groups(), 4);
    const int low = bits == 4 ? -8 : -127, high = bits == 4 ? 7 : 127;
    for (int64_t row = 0; row < w.rows; ++row) {
      for (int64_t col = 0; col < w.cols; ++col) {
        const float scale = f16_to_f32(rounded.scales[static_cast<size_t>(row * 4 + col / 64)]);
        ASSERT_GT(scale, 0.0f);
        const double best = std::clamp(std::nearbyint(double{w.row(row)[col]} / scale),
                                       static_cast<double>(low), static_cast<double>(high));
        EXPECT_EQ(packed_code(view, row, col), static_cast<int>(best)) << row << "," << col;
      }
    }
  }
}

// Two strips of 16 rows walk together where there are enough of them: what rows become must not
// depend on which strips they share the walk with, nor on threads.
TEST(Rounding, RowsDoNotDependOnTheRowsBesideThem) {
  constexpr int64_t kRows = 16 * 17 + 5, kCols = 300;  // pairs, an odd strip, a short one
  Gram gram(kCols);
  const FloatMatrix x = correlated_inputs(400, kCols, 7);
  gram.add(x.data.data(), x.rows, 2);
  const GptqFactor factor = factorize(gram, 2, "test");
  const FloatMatrix w = random_matrix(kRows, kCols, 8);
  const Rounded together = round_matrix(w, {4, 64}, &factor, 1);
  const Rounded threads = round_matrix(w, {4, 64}, &factor, 3);
  EXPECT_EQ(threads.matrix.data, together.matrix.data);
  EXPECT_EQ(threads.n_clipped, together.n_clipped);
  int64_t n_clipped = 0;
  for (int64_t first = 0; first < kRows; first += 16) {
    const int64_t count = std::min<int64_t>(16, kRows - first);
    const FloatMatrix part = make(count, kCols, {w.row(first), w.row(first) + count * kCols});
    const Rounded alone = round_matrix(part, {4, 64}, &factor, 1);
    n_clipped += alone.n_clipped;
    const int64_t bytes = alone.matrix.view().row_bytes(), groups = alone.matrix.view().n_groups();
    EXPECT_TRUE(std::equal(alone.matrix.data.begin(), alone.matrix.data.end(),
                           together.matrix.data.begin() + first * bytes));
    EXPECT_TRUE(std::equal(alone.matrix.scales.begin(), alone.matrix.scales.end(),
                           together.matrix.scales.begin() + first * groups));
  }
  EXPECT_EQ(n_clipped, together.n_clipped);
}

TEST(Rounding, TwoLevelScalesCostLittleAndAreMultiplesOfSevenBits) {
  FloatMatrix w = random_matrix(40, 512, 15);
  for (int64_t row = 0; row < w.rows; ++row) {  // rows of all sizes, one group far below the rest
    for (int64_t col = 0; col < w.cols; ++col) {
      w.row(row)[col] *= std::ldexp(1.0f, static_cast<int>(row % 30) - 25);
      if (col < 64) w.row(row)[col] *= 0.01f;
    }
  }
  for (int64_t col = 0; col < 64; ++col) w.row(5)[col] = 0;
  for (int64_t col = 0; col < w.cols; ++col) w.row(6)[col] = 0;
  const OwnedMatrix two_level = round_matrix(w, {4, 64, true}, nullptr, 2).matrix;
  const OwnedMatrix free = round_matrix(w, {4, 64}, nullptr, 2).matrix;
  for (int64_t row = 0; row < w.rows; ++row) {
    std::vector<float> scales;
    for (int64_t i = 0; i < 8; ++i) {
      scales.push_back(f16_to_f32(two_level.scales[static_cast<size_t>(row * 8 + i)]));
      ASSERT_GT(scales.back(), 0);
    }
    EXPECT_LE(*std::max_element(scales.begin(), scales.end()) / common_unit(scales), kMostMultiple)
        << row;
    const auto error = [&](const OwnedMatrix& rounded) {
      const FloatMatrix values = to_float_matrix(rounded.view());
      double sum = 0;
      for (int64_t i = 64; i < 512; ++i) {
        const double d = double{w.row(row)[i]} - double{values.row(row)[i]};
        sum += d * d;
      }
      return sum;
    };
    // Normal rows have scales within a third of each other, multiples of 10 to 15: a step is a
    // twentieth longer at most, and so is the error. Below 2^-17 f16's grid is coarser than that.
    if (row % 30 > 8) {
      EXPECT_LT(error(two_level), 1.05 * 1.05 * error(free)) << row;
    }
  }
  // Every multiple of every unit is an f16 number, and the unit is found again.
  for (float wanted : {1e-9f, 0.000123f, 0.01f, 0.0777f, 3.0f}) {
    const float unit = round_unit(wanted);
    EXPECT_NEAR(unit, wanted, std::max(wanted / 128, 0x1p-24f));
    std::vector<float> scales;
    for (int multiple : {15, 10, 6, 1}) {
      scales.push_back(unit * static_cast<float>(multiple));
      EXPECT_EQ(f16_to_f32(f32_to_f16(scales.back())), scales.back()) << wanted << multiple;
    }
    EXPECT_EQ(common_unit(scales), unit);
  }
}

TEST(Rounding, ClipSearchNeverLosesToTheFullRange) {
  const FloatMatrix w = random_matrix(64, 64, 5);
  const OwnedMatrix rounded = round_matrix(w, {4, 64}, nullptr, 1).matrix;
  FloatMatrix plain = w;
  for (int64_t row = 0; row < w.rows; ++row) {
    float largest = 0;
    for (int64_t col = 0; col < 64; ++col) largest = std::max(largest, std::fabs(w.row(row)[col]));
    const float scale = f16_to_f32(f32_to_f16(largest / 7));
    for (int64_t col = 0; col < 64; ++col) {
      plain.row(row)[col] =
          scale * std::clamp(std::nearbyint(w.row(row)[col] / scale), -8.0f, 7.0f);
    }
  }
  // The searched scale is better by over 5 % on normal values; a search stuck at the first
  // candidate would be equal.
  EXPECT_LT(squared_error(to_float_matrix(rounded.view()), w), 0.95 * squared_error(plain, w));
}

TEST(Rounding, OneOutlierIsClippedAndCounted) {
  // A scale that reaches 9 would move 127 values by up to 0.64 each; clipping costs one value more.
  std::vector<float> values(128);
  for (size_t i = 0; i < 128; ++i) values[i] = i % 2 ? 1.0f : -0.9f;
  values[77] = 9.0f;
  const Rounded rounded = round_matrix(make(1, 128, values), {4, 128}, nullptr, 1);
  EXPECT_EQ(rounded.n_clipped, 1);
}

TEST(Rounding, AZeroMatrixStaysZero) {
  const FloatMatrix w = make(3, 64, std::vector<float>(192, 0.0f));
  const OwnedMatrix rounded = round_matrix(w, {4, 32}, nullptr, 1).matrix;
  EXPECT_EQ(to_float_matrix(rounded.view()).data, w.data);
  for (uint16_t scale : rounded.scales) EXPECT_GT(f16_to_f32(scale), 0.0f);
}

TEST(Rounding, TinyAndHugeWeightsKeepFiniteScales) {
  for (float magnitude : {1e-30f, 1e-9f, 1e30f}) {
    const FloatMatrix w = make(1, 32, std::vector<float>(32, magnitude));
    const OwnedMatrix rounded = round_matrix(w, {4, 32}, nullptr, 1).matrix;
    const float scale = f16_to_f32(rounded.scales[0]);
    EXPECT_TRUE(scale > 0 && std::isfinite(scale)) << magnitude;
  }
}

TEST(Rounding, BitsPerWeightAreExact) {
  for (const auto& [group, bits] :
       {std::pair<int64_t, double>{64, 4.25}, {128, 4.125}, {32, 4.5}}) {
    const OwnedMatrix rounded =
        round_matrix(random_matrix(16, 256, 1), {4, group}, nullptr, 1).matrix;
    EXPECT_EQ(8.0 * static_cast<double>(rounded.n_bytes()) / (16 * 256), bits);
  }
}

TEST(Gram, EqualsTheSumOfOuterProducts) {
  const int64_t tokens = 600, n = 37;  // over two chunks, ragged tiles
  const FloatMatrix x = random_matrix(tokens, n, 9);
  Gram gram(n);
  gram.add(x.data.data(), 300, 2);
  gram.add(x.row(300), 300, 1);
  EXPECT_EQ(gram.n_rows(), tokens);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double exact = 0, magnitude = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        exact += double{x.row(t)[i]} * x.row(t)[j];
        magnitude += std::fabs(double{x.row(t)[i]} * x.row(t)[j]);
      }
      // At most 256 f32 additions and one product each: relative to the sum of magnitudes, 257 eps.
      EXPECT_NEAR(gram.at(i, j), exact, 257 * 0x1p-24 * magnitude) << i << "," << j;
    }
  }
}

TEST(Gram, DoesNotDependOnThreads) {
  const FloatMatrix x = random_matrix(300, 70, 2);
  Gram one(70), two(70);
  one.add(x.data.data(), 300, 1);
  two.add(x.data.data(), 300, 2);
  for (int64_t i = 0; i < 70; ++i) {
    for (int64_t j = 0; j < 70; ++j) ASSERT_EQ(one.at(i, j), two.at(i, j));
  }
}

TEST(Gram, OutputEnergyIsTheEnergyOfTheOutputs) {
  const int64_t n = 33;
  const FloatMatrix x = correlated_inputs(100, n, 4), w = random_matrix(19, n, 8);
  Gram gram(n);
  gram.add(x.data.data(), 100, 1);
  double energy = 0;
  for (int64_t t = 0; t < 100; ++t) {
    for (int64_t row = 0; row < w.rows; ++row) {
      double y = 0;
      for (int64_t j = 0; j < n; ++j) y += double{x.row(t)[j]} * w.row(row)[j];
      energy += y * y;
    }
  }
  // The Gram's entries carry f32 sums of 100 products: 100 eps relative to non-cancelling terms.
  EXPECT_NEAR(output_energy(w, gram, 2), energy, 1e-4 * energy);
}

TEST(Gptq, FactorInvertsTheDampedGram) {
  const int64_t n = 150;  // more than one block of solved columns
  const FloatMatrix x = correlated_inputs(400, n, 7);
  Gram gram(n);
  gram.add(x.data.data(), 400, 2);
  const GptqFactor factor = factorize(gram, 2, "test");
  EXPECT_GT(factor.damping, 0);
  // (H + d I) U^T U = I. U is stored in f32; its entries times H's are bounded by the condition
  // number, at most 1e2 * n here because of the damping: 1e4 * 2^-24 * n < 0.1 at worst.
  for (int64_t i = 0; i < n; i += 7) {
    std::vector<double> ux(static_cast<size_t>(n)), inverse(static_cast<size_t>(n));
    for (int64_t r = 0; r <= i; ++r) ux[r] = factor.u[static_cast<size_t>(r * n + i)];
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t r = 0; r <= j; ++r) {
        inverse[j] += factor.u[static_cast<size_t>(r * n + j)] * ux[r];
      }
    }
    for (int64_t row = 0; row < n; ++row) {
      double sum = factor.damping * inverse[row];
      for (int64_t j = 0; j < n; ++j) sum += gram.at(row, j) * inverse[j];
      EXPECT_NEAR(sum, row == i ? 1.0 : 0.0, 0.01);
    }
    for (int64_t j = 0; j < i; ++j) EXPECT_EQ(factor.u[static_cast<size_t>(i * n + j)], 0.0f);
  }
}

TEST(Gptq, OnAnIdentityGramEqualsRoundingToNearest) {
  const int64_t n = 192;
  FloatMatrix x = make(n, n, std::vector<float>(static_cast<size_t>(n * n)));
  for (int64_t i = 0; i < n; ++i) x.row(i)[i] = 1;
  Gram gram(n);
  gram.add(x.data.data(), n, 1);
  const GptqFactor factor = factorize(gram, 1, "test");
  const FloatMatrix w = random_matrix(40, n, 12);
  const Rounded gptq = round_matrix(w, {4, 64}, &factor, 2);
  const Rounded nearest = round_matrix(w, {4, 64}, nullptr, 2);
  EXPECT_EQ(gptq.matrix.data, nearest.matrix.data);
  EXPECT_EQ(gptq.matrix.scales, nearest.matrix.scales);
}

TEST(Gptq, NoInputsAtAllEqualsRoundingToNearest) {
  const GptqFactor factor = factorize(Gram(64), 1, "test");
  const FloatMatrix w = random_matrix(5, 64, 12);
  EXPECT_EQ(round_matrix(w, {4, 32}, &factor, 1).matrix.data,
            round_matrix(w, {4, 32}, nullptr, 1).matrix.data);
}

TEST(Gptq, LowersTheOutputErrorOnCorrelatedInputs) {
  const int64_t n = 256;
  const FloatMatrix x = correlated_inputs(1000, n, 21), w = random_matrix(48, n, 22);
  Gram gram(n);
  gram.add(x.data.data(), 1000, 2);
  const GptqFactor factor = factorize(gram, 2, "test");
  const double gptq = output_error(w, round_matrix(w, {4, 64}, &factor, 2).matrix, gram);
  const double nearest = output_error(w, round_matrix(w, {4, 64}, nullptr, 2).matrix, gram);
  // Four directions carry nearly all energy and can be compensated almost fully.
  EXPECT_LT(gptq, 0.5 * nearest);
}

TEST(Gptq, MatchesThePlainColumnLoop) {
  // The algorithm of the paper without blocks, in f64, at one group per row.
  const int64_t n = 160;
  const FloatMatrix x = correlated_inputs(500, n, 31), w = random_matrix(3, n, 32);
  Gram gram(n);
  gram.add(x.data.data(), 500, 1);
  const GptqFactor factor = factorize(gram, 1, "test");
  const OwnedMatrix rounded = round_matrix(w, {4, 32}, &factor, 1).matrix;
  int64_t n_different = 0;
  for (int64_t row = 0; row < w.rows; ++row) {
    std::vector<double> v(w.row(row), w.row(row) + n);
    for (int64_t col = 0; col < n; ++col) {
      const double scale = f16_to_f32(rounded.scales[static_cast<size_t>(row * 5 + col / 32)]);
      const double code = std::clamp(std::nearbyint(v[col] / scale), -8.0, 7.0);
      const int got = packed_code(rounded.view(), row, col);
      n_different += got != static_cast<int>(code);
      // Follow the codes taken, so that one tie decided otherwise does not derail the comparison.
      const double error = (v[col] - scale * got) / factor.u[static_cast<size_t>(col * n + col)];
      for (int64_t j = col + 1; j < n; ++j) {
        v[j] -= error * factor.u[static_cast<size_t>(col * n + j)];
      }
    }
  }
  EXPECT_LE(n_different, 1);  // f32 against f64 may decide a near-tie of 480 otherwise
}

// Inputs of very different size: rounding the loud ones first leaves more to compensate with.
TEST(Gptq, ActivationOrderLowersTheOutputErrorAndKeepsGroups) {
  const int64_t n = 224;  // three whole groups of 64 and a short one
  FloatMatrix x = correlated_inputs(1000, n, 25);
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t i = 128; i < n; ++i) x.row(t)[i] *= 8;
  }
  const FloatMatrix w = random_matrix(48, n, 26);
  Gram gram(n);
  gram.add(x.data.data(), x.rows, 1);
  const ColumnOrder order = activation_order(gram, 64);
  ASSERT_EQ(order.size(), static_cast<size_t>(n));
  for (int64_t at = 0; at < n; ++at) {
    EXPECT_EQ(order[static_cast<size_t>(at)] / 64, order[static_cast<size_t>(at / 64 * 64)] / 64);
    if (at % 64 == 0) continue;
    const int64_t before = order[static_cast<size_t>(at - 1)], col = order[static_cast<size_t>(at)];
    EXPECT_GE(gram.at(before, before), gram.at(col, col));
  }
  EXPECT_EQ(order[0] / 64, 2);    // the loud whole group
  EXPECT_EQ(order[192] / 64, 3);  // the short one stays last
  const GptqFactor plain = factorize(gram, 1, "test"), ordered = factorize(gram, 1, "test", order);
  const double as_they_stand = output_error(w, round_matrix(w, {4, 64}, &plain, 1).matrix, gram);
  EXPECT_LT(output_error(w, round_matrix(w, {4, 64}, &ordered, 1).matrix, gram), as_they_stand);
  // Only a walk depends on the order, not what is solved with the factor.
  const FloatMatrix a = solve_right(w, plain, 1), b = solve_right(w, ordered, 1);
  double difference = 0, size = 0;
  for (size_t i = 0; i < a.data.size(); ++i) {
    difference += std::pow(double{a.data[i]} - double{b.data[i]}, 2);
    size += std::pow(double{a.data[i]}, 2);
  }
  // Two triangular products of up to n terms in f32.
  EXPECT_LT(std::sqrt(difference), 2 * n * 0x1.0p-24 * std::sqrt(size));
}

TEST(Gptq, DeadInputsDoNotHurt) {
  FloatMatrix x = correlated_inputs(200, 64, 41);
  for (int64_t t = 0; t < 200; ++t) x.row(t)[10] = x.row(t)[63] = 0;
  Gram gram(64);
  gram.add(x.data.data(), 200, 1);
  const GptqFactor factor = factorize(gram, 1, "test");
  const FloatMatrix w = random_matrix(8, 64, 42);
  const FloatMatrix rounded = to_float_matrix(round_matrix(w, {4, 32}, &factor, 1).matrix.view());
  // Weights of dead inputs are rounded, not cleared: they may be alive on other text.
  double energy = 0;
  for (int64_t row = 0; row < 8; ++row) energy += std::fabs(rounded.row(row)[10]);
  EXPECT_GT(energy, 0);
  for (float value : rounded.data) EXPECT_TRUE(std::isfinite(value));
}

TEST(Gptq, ResultDoesNotDependOnThreads) {
  const int64_t n = 256;
  const FloatMatrix x = correlated_inputs(300, n, 51), w = random_matrix(100, n, 52);
  Gram gram(n);
  gram.add(x.data.data(), 300, 2);
  const GptqFactor one = factorize(gram, 1, "test"), two = factorize(gram, 2, "test");
  EXPECT_EQ(one.u, two.u);
  EXPECT_EQ(round_matrix(w, {4, 64}, &one, 1).matrix.data,
            round_matrix(w, {4, 64}, &two, 2).matrix.data);
}

TEST(Gptq, RefusesInfiniteActivations) {
  std::vector<float> x(64, 1.0f);
  x[5] = INFINITY;
  Gram gram(64);
  gram.add(x.data(), 1, 1);
  EXPECT_THROW(factorize(gram, 1, "layers.0.wq"), Error);
}

}  // namespace
}  // namespace tq
