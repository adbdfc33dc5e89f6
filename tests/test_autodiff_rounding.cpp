// Rounding on the tape: the runtime's bits, and the gradients that its header promises.
#include <gtest/gtest.h>

#include "cpu/autodiff_rounding.h"
#include "cpu/ops.h"
#include "quant/site_stats.h"
#include "tests/autodiff_cases.h"

namespace tq {
namespace {

Floats rounded(const Floats& x, Shape shape, const GroupRounding& rounding) {
  Tape tape(kernels_for(best_isa()), 2);
  const Var y = round_groups(tape.constant(shape, x.data()), rounding);
  return Floats(y.data(), y.data() + x.size());
}

constexpr ActCodes kAllCodes[] = {ActCodes::kSymmetric, ActCodes::kAll, ActCodes::kAsymmetric};

TEST(RoundGroups, ValuesAreTheRuntimesBits) {
  Floats x = random_floats(7 * 150, 1);
  for (size_t i = 0; i < 64; ++i) x[i] = 0;                                  // a group of zeros
  for (size_t i = 0; i < 7; ++i) x[150 + i] = 0.5f * static_cast<float>(i);  // ties
  for (size_t i = 0; i < 150; ++i) x[300 + i] = std::fabs(x[300 + i]);       // one side only
  const std::pair<int, ActCodes> kinds[] = {{4, ActCodes::kSymmetric},
                                            {8, ActCodes::kSymmetric},
                                            {4, ActCodes::kAll},
                                            {3, ActCodes::kAsymmetric},
                                            {4, ActCodes::kAsymmetric}};
  for (const auto& [bits, kind] : kinds) {
    for (float clip : {1.0f, 0.8f}) {
      const Floats y = rounded(x, {1, 7, 150}, {bits, 64, kind, clip});
      for (int64_t row = 0; row < 7; ++row) {
        for (int64_t begin = 0; begin < 150; begin += 64) {
          const int64_t count = std::min<int64_t>(64, 150 - begin), at = row * 150 + begin;
          int8_t codes[64];
          float scale;
          plain_round({x.data() + at, count, bits, clip, kind, codes, &scale});
          for (int64_t i = 0; i < count; ++i) {
            ASSERT_EQ(y[static_cast<size_t>(at + i)], scale * static_cast<float>(codes[i]));
          }
        }
      }
    }
  }
}

TEST(RoundGroups, HandSizedCases) {
  // 3 bits, symmetric: scale 6 / 3 = 2, codes -3..3.
  EXPECT_EQ(rounded({6, -5.5f, 3, 0.9f}, {1, 1, 4}, {3, 4}), (Floats{6, -6, 4, 0}));
  // Full range of 4 bits: m = -8 has the code -8 with scale 1; +8 is clipped to 7.
  EXPECT_EQ(rounded({-8, 8, 2.4f, -0.6f}, {1, 1, 4}, {4, 4, ActCodes::kAll}),
            (Floats{-8, 7, 2, -1}));
  // m = +8: scale -1, so the range is -7..8.
  EXPECT_EQ(rounded({8, -8, 2.4f, -0.6f}, {1, 1, 4}, {4, 4, ActCodes::kAll}),
            (Floats{8, -7, 2, -1}));
  // Asymmetric: 15 steps of 1 from -4 to 11; at half of it, from -2 to 5.5.
  EXPECT_EQ(rounded({-4, 11, 2.4f, -0.6f}, {1, 1, 4}, {4, 4, ActCodes::kAsymmetric}),
            (Floats{-4, 11, 2, -1}));
  EXPECT_EQ(rounded({-4, 11, 2.4f, -0.6f}, {1, 1, 4}, {4, 4, ActCodes::kAsymmetric, 0.5f}),
            (Floats{-2, 5.5f, 2.5f, -0.5f}));
  // Half of the range: what lies outside becomes its end.
  EXPECT_EQ(rounded({7, 1, -1, -7}, {1, 1, 4}, {4, 4, ActCodes::kSymmetric, 0.5f}),
            (Floats{3.5f, 1, -1, -3.5f}));
}

TEST(RoundGroups, TwoLevelScalesAreTheRuntimes) {
  const Floats x = random_floats(6 * 128, 3);
  for (int bits : {3, 4}) {
    for (ActCodes codes : {ActCodes::kSymmetric, ActCodes::kAll}) {
      Floats expected(x.size());
      round_tokens(x.data(), 6, 128, {bits, 32, 0.9f, codes, true}, expected.data(), 1);
      EXPECT_EQ(rounded(x, {1, 6, 128}, {bits, 32, codes, 0.9f, true}), expected);
      // It is another rounding than that with free scales.
      EXPECT_NE(rounded(x, {1, 6, 128}, {bits, 32, codes, 0.9f}), expected);
    }
  }
}

// Codes, and what is inside the range, frozen at the inputs of the case: a smooth function with the
// gradient that is meant. Inside: x + s (code - v0), clipped: s code.
struct Frozen {
  GroupRounding rounding;
  bool frozen_scale;
  Shape shape;
  Floats x0;
  double clip0;

  double scale(const Doubles& x, size_t at, size_t count, double clip) const {
    size_t k = at, most = at, least = at;
    for (size_t i = at; i < at + count; ++i) {
      if (std::fabs(x0[i]) > std::fabs(x0[k])) k = i;
      if (x0[i] > x0[most]) most = i;
      if (x0[i] < x0[least]) least = i;
    }
    const double half = 1 << (rounding.bits - 1);
    const double m = x[k] * clip;
    if (rounding.codes == ActCodes::kAsymmetric) {
      return clip * (std::max(0.0, x[most]) - std::min(0.0, x[least])) / (2 * half - 1);
    }
    return rounding.codes == ActCodes::kAll ? -m / half : std::fabs(m) / (half - 1);
  }
  // The range of codes of a group with this scale, and how far outside is still inside.
  struct Ends {
    double low, high, slack;
  };
  Ends ends(size_t at, size_t count, double s0) const {
    const double half = 1 << (rounding.bits - 1);
    if (rounding.codes != ActCodes::kAsymmetric) {
      return {rounding.codes == ActCodes::kAll ? -half : 1 - half, half - 1, 0};
    }
    double least = 0;
    for (size_t i = at; i < at + count; ++i) least = std::min(least, double{x0[i]});
    const double zero = std::nearbyint(-least * clip0 / s0);
    return {-zero, 2 * half - 1 - zero, 0.5};
  }
  Doubles operator()(const std::vector<Doubles>& in) const {
    const Doubles& x = in[0];
    const Doubles base(x0.begin(), x0.end());
    const double clip = in.size() > 1 ? in[1][0] : clip0;
    Doubles y;
    for (int64_t row = 0; row < shape.batch * shape.rows; ++row) {
      for (int64_t begin = 0; begin < shape.cols; begin += rounding.group) {
        const size_t at = static_cast<size_t>(row * shape.cols + begin);
        const size_t count = static_cast<size_t>(std::min(rounding.group, shape.cols - begin));
        const double s0 = scale(base, at, count, clip0);
        const double s = frozen_scale ? s0 : scale(x, at, count, clip);
        const auto [low, high, slack] = ends(at, count, s0);
        for (size_t i = at; i < at + count; ++i) {
          const double v0 = base[i] / s0;
          const bool inside = v0 > low - slack - 1e-6 && v0 < high + slack + 1e-6;
          const double code = std::clamp(std::nearbyint(v0), low, high);
          y.push_back(inside ? x[i] + s * (code - v0) : s * code);
        }
      }
    }
    return y;
  }
};

void check_rounding(const GroupRounding& rounding, RoundGradient kind, bool learned_clip) {
  GradientCase c;
  const Shape shape = {2, 2, 11};  // groups of 4, 4 and 3
  c.shapes = {shape};
  if (learned_clip) c.shapes.push_back({1, 1, 1});
  c.prepare = [&](size_t input, float value) { return input == 1 ? rounding.clip : value; };
  c.on_tape = [&](const std::vector<Var>& v) {
    return learned_clip ? round_groups(v[0], rounding, v[1], kind)
                        : round_groups(v[0], rounding, kind);
  };
  const bool frozen_scale = kind == RoundGradient::kStraightThrough && !learned_clip;
  c.reference = Frozen{rounding, frozen_scale, shape, case_inputs(c, 1)[0],
                       static_cast<double>(rounding.clip)};
  // code - v has v with 3 roundings of a number up to 128, where the difference is up to 1/2; as
  // a share of |dy/dx| <= 1 of the element that sets the scale that is 3 * 128 / 128.
  c.jacobian_floor = 1;
  check_gradients(c);
}

TEST(RoundGroups, GradientsWithCodesFrozen) {
  for (int bits : {3, 4, 8}) {
    for (ActCodes codes : kAllCodes) {
      for (float clip : {1.0f, 0.6f}) {
        const GroupRounding rounding = {bits, 4, codes, clip};
        check_rounding(rounding, RoundGradient::kStraightThrough, false);
        check_rounding(rounding, RoundGradient::kWithScale, false);
        check_rounding(rounding, RoundGradient::kWithScale, true);
      }
    }
  }
}

TEST(RoundGroups, ScaleGradientIsTheTrueSlopeAlongTheElementThatSetsIt) {
  // Away from code boundaries the function itself, not a surrogate, changes by the scale alone:
  // y_i = s code_i, so dy_i / dx_k = code_i / qmax, for every i that is not k.
  const Floats x = {7, 2.2f, -3.1f, 0.9f}, w = {0.5f, 1, -2, 3};
  Floats gradient(4);
  Tape tape(kernels_for(best_isa()), 1);
  const Var v = tape.parameter({1, 1, 4}, x.data(), gradient.data());
  const Var y = round_groups(v, {4, 4});
  tape.backward(y, Tensor({1, 1, 4}, w.data()));
  const auto loss = [&](float x0) {
    const Floats r = rounded({x0, x[1], x[2], x[3]}, {1, 1, 4}, {4, 4});
    double sum = 0;
    for (size_t i = 0; i < 4; ++i) sum += double{w[i]} * double{r[i]};
    return sum;
  };
  const double true_slope = (loss(7.125f) - loss(6.875f)) / 0.25;
  // The straight-through part says x_k moves its neighbours' v; the true function does not see it:
  // sum over i != k of w_i v_i / qmax is the difference.
  const double surrogate = (1 * 2.2 + -2 * -3.1 + 3 * 0.9) / 7;
  EXPECT_NEAR(static_cast<double>(gradient[0]), true_slope - surrogate, 1e-5);  // 24 eps of 3
}

TEST(RoundGroups, AsymmetricScaleGradientIsTheTrueSlopeAlongBothEnds) {
  // y_i = s code_i with s = (x_0 - x_2) / 15, away from code boundaries.
  const Floats x = {10.2f, 2.2f, -4.8f, 0.9f}, w = {0.5f, 1, -2, 3};  // s = 1, z = round(4.8) = 5
  const GroupRounding rounding = {4, 4, ActCodes::kAsymmetric};
  Floats gradient(4);
  Tape tape(kernels_for(best_isa()), 1);
  const Var v = tape.parameter({1, 1, 4}, x.data(), gradient.data());
  tape.backward(round_groups(v, rounding), Tensor({1, 1, 4}, w.data()));
  const auto loss = [&](size_t moved, float by) {
    Floats at = x;
    at[moved] += by;
    const Floats r = rounded(at, {1, 1, 4}, rounding);
    double sum = 0;
    for (size_t i = 0; i < 4; ++i) sum += double{w[i]} * double{r[i]};
    return sum;
  };
  double v_sum = 0;  // sum of w_i v_i
  for (size_t i = 0; i < 4; ++i) v_sum += double{w[i]} * double{x[i]};
  const double ends[2] = {1, -1};  // signs of ds / dx
  for (size_t k = 0; k < 2; ++k) {
    const size_t end = 2 * k;
    const double true_slope = (loss(end, 0.125f) - loss(end, -0.125f)) / 0.25;
    // Straight through moves every v_i by 1 / s of its own and by -v_i / s of the scale's change;
    // the true function sees neither.
    const double surrogate = double{w[end]} - ends[k] * v_sum / 15;
    EXPECT_NEAR(static_cast<double>(gradient[end]), true_slope + surrogate, 1e-5);  // as above
  }
}

TEST(RoundWithScales, GradientsOfWeightsAndScales) {
  const Shape shape = {2, 3, 10};  // groups of 4, 4, 2
  GradientCase c;
  c.shapes = {shape, {2, 3, 3}};
  c.prepare = [](size_t input, float v) { return input == 1 ? 0.1f + 0.1f * std::fabs(v) : v; };
  c.on_tape = [](const std::vector<Var>& v) { return round_with_scales(v[0], v[1], 4, 4); };
  const std::vector<Floats> base = case_inputs(c, 1);
  c.reference = [&](const std::vector<Doubles>& in) {
    Doubles y;
    for (size_t i = 0; i < in[0].size(); ++i) {
      const size_t group = i / 10 * 3 + i % 10 / 4;
      const double v0 = double{base[0][i]} / double{base[1][group]}, s = in[1][group];
      const double code = std::clamp(std::nearbyint(v0), -8.0, 7.0);
      y.push_back(v0 >= -8 && v0 <= 7 ? in[0][i] + s * (code - v0) : s * code);
    }
    return y;
  };
  c.jacobian_floor = 1;  // as above: v has the roundings of a number up to 8
  check_gradients(c);
}

TEST(RoundWithScales, AScaleOfZeroGivesZero) {
  const Floats w = {1, -2}, s = {0};
  Tape tape(kernels_for(best_isa()), 1);
  const Var y = round_with_scales(tape.constant({1, 1, 2}, w.data()),
                                  tape.constant({1, 1, 1}, s.data()), 4, 2);
  EXPECT_EQ(y.data()[0], 0);
  EXPECT_EQ(y.data()[1], 0);
}

}  // namespace
}  // namespace tq
