// magnitude - which powers of two are taken out, and taking them out. See magnitude.h.
#include "quant/magnitude.h"

#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"

namespace tq {
namespace {

// The largest weight of a matrix that is left as it is: some hundredths to some tens are usual.
constexpr float kSmallestOrdinary = 0x1p-8f, kLargestOrdinary = 0x1p10f;
constexpr float kSmallestInput = 0x1p-20f, kLargestInput = 0x1p20f;
// Below this share of its row's largest, a group is nothing to a sum in f32.
constexpr float kNegligible = 0x1p-30f;

// What the largest magnitude of a group, or of a row, may be.
struct Limits {
  float low, high;
  int high_level;  // 2^high_level leaves most room below that is safe above
};

// 4 bits: scale >= 2^-18, of which f16 still has 6 bits: an error of 2^-7 beside codes that are off
// by 2^-4. 8 bits need more of the scale, two-level ones more of the unit, a 15th. Upwards GPTQ
// needs room, which may make weights larger.
Limits limits_of(const RoundingSpec& spec) {
  if (spec.two_level) return {0x1p-10f, 0x1p16f, 13};
  return spec.bits == 8 ? Limits{0x1p-10f, 0x1p20f, 17} : Limits{0x1p-15f, 0x1p16f, 13};
}

// Largest magnitude of a row, and of its quietest group that counts; 0, 0 for a row of zeros.
struct Reach {
  float top = 0, low = 0;
};

Reach reach_of(const float* row, int64_t cols, const RoundingSpec& spec) {
  Reach reach;
  for (int64_t i = 0; i < cols; ++i) reach.top = std::max(reach.top, std::fabs(row[i]));
  reach.low = reach.top;
  if (spec.two_level) return reach;  // quiet groups have a 15th of the loud one's scale anyway
  for (int64_t begin = 0; begin < cols; begin += spec.group) {
    float largest = 0;
    for (int64_t i = begin; i < std::min(cols, begin + spec.group); ++i) {
      largest = std::max(largest, std::fabs(row[i]));
    }
    if (largest > kNegligible * reach.top) reach.low = std::min(reach.low, largest);
  }
  return reach;
}

bool fits(const Reach& reach, int exponent, const Limits& limits) {
  return reach.top == 0 || (std::ldexp(reach.low, -exponent) >= limits.low &&
                            std::ldexp(reach.top, -exponent) <= limits.high);
}

// e with 2^(e - 1) <= x < 2^e.
int exponent_of(float x) {
  int exponent = 0;
  std::frexp(x, &exponent);
  return exponent;
}

// The even number at or below: a branch splits the power into two equal ones.
int even(int exponent) {
  return exponent & ~1;
}

float largest_of(const FloatMatrix& w, int threads) {
  std::vector<float> of_row(static_cast<size_t>(w.rows));
  parallel_ranges(threads, w.rows, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      float largest = 0;
      for (int64_t i = 0; i < w.cols; ++i) largest = std::max(largest, std::fabs(w.row(row)[i]));
      of_row[static_cast<size_t>(row)] = largest;
    }
  });
  return of_row.empty() ? 0 : *std::max_element(of_row.begin(), of_row.end());
}

}  // namespace

void take_out_powers(FloatLayer& layer, int threads) {
  for (size_t i = 0; i < kNLinears; ++i) {
    FloatMatrix& w = layer.linears[i];
    const float largest = largest_of(w, threads);
    if (largest == 0 || (largest >= kSmallestOrdinary && largest <= kLargestOrdinary)) continue;
    const int exponent = std::clamp(even(exponent_of(largest)), kMinExponent, kMaxExponent - 1);
    layer.exponents[i].assign(static_cast<size_t>(w.rows), static_cast<int8_t>(exponent));
    scale_rows(w, layer.exponents[i], -1, threads);
  }
}

std::vector<int8_t> row_exponents(const FloatMatrix& w, const RoundingSpec& spec,
                                  const std::vector<int8_t>& taken, int threads, double tolerated) {
  const Limits limits = limits_of(spec);
  std::vector<Reach> rows(static_cast<size_t>(w.rows));
  parallel_ranges(threads, w.rows, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      rows[static_cast<size_t>(row)] = reach_of(w.row(row), w.cols, spec);
    }
  });
  int64_t n_rows = 0, n_unfit = 0;  // of rows that are not zero
  bool level_fits = true;
  float largest = 0;
  for (const Reach& reach : rows) {
    n_rows += reach.top > 0;
    n_unfit += !fits(reach, 0, limits);
    level_fits = level_fits && fits(reach, exponent_of(reach.top), limits);
    largest = std::max(largest, reach.top);
  }
  if (static_cast<double>(n_unfit) <= tolerated * static_cast<double>(n_rows)) return {};
  // Rows keep their proportions where they can: a branch is for what is loud.
  const int level = level_fits ? 0 : limits.high_level - 1,
            common = even(exponent_of(largest)) - level;
  std::vector<int8_t> result;
  for (size_t i = 0; i < rows.size(); ++i) {
    const int exponent = fits(rows[i], common, limits) ? common : exponent_of(rows[i].top) - level;
    const int before = taken.empty() ? 0 : taken[i];
    const int sum = std::clamp(before + exponent, kMinExponent, kMaxExponent);
    result.push_back(static_cast<int8_t>(std::clamp(sum - before, kMinExponent, kMaxExponent)));
  }
  return result;
}

void scale_rows(FloatMatrix& w, const std::vector<int8_t>& exponents, int sign, int threads) {
  parallel_ranges(threads, w.rows, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const int exponent = sign * exponents[static_cast<size_t>(row)];
      for (int64_t i = 0; i < w.cols; ++i) w.row(row)[i] = std::ldexp(w.row(row)[i], exponent);
    }
  });
}

int input_exponent(std::span<const float> x) {
  float largest = 0;
  for (float value : x) largest = std::max(largest, std::fabs(value));
  if (largest == 0 || (largest >= kSmallestInput && largest <= kLargestInput)) return 0;
  return std::clamp(even(exponent_of(largest)), kMinExponent, kMaxExponent - 1);
}

void balance_powers(LowRank& factors) {
  const float a = largest_of(factors.a, 1), b = largest_of(factors.b, 1);
  const auto ordinary = [](float x) { return x >= kSmallestOrdinary && x <= kLargestOrdinary; };
  if (a == 0 || b == 0 || (ordinary(a) && ordinary(b))) return;
  const int t = (exponent_of(b) - exponent_of(a)) / 2;
  for (float& value : factors.a.data) value = std::ldexp(value, t);
  for (float& value : factors.b.data) value = std::ldexp(value, -t);
}

}  // namespace tq
