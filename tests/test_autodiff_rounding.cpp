// Rounding on the tape: the runtime's bits, and the gradients that its header promises.
#include <gtest/gtest.h>

#include "cpu/autodiff_rounding.h"
#include "cpu/ops.h"
#include "tests/autodiff_cases.h"

namespace tq {
namespace {

Floats rounded(const Floats& x, Shape shape, const GroupRounding& rounding) {
  Tape tape(kernels_for(best_isa()), 2);
  const Var y = round_groups(tape.constant(shape, x.data()), rounding);
  return Floats(y.data(), y.data() + x.size());
}

TEST(RoundGroups, SymmetricValuesAreTheRuntimesBits) {
  Floats x = random_floats(7 * 150, 1);
  for (size_t i = 0; i < 64; ++i) x[i] = 0;                                  // a group of zeros
  for (size_t i = 0; i < 7; ++i) x[150 + i] = 0.5f * static_cast<float>(i);  // ties
  for (int bits : {4, 8}) {
    for (float clip : {1.0f, 0.8f}) {
      const Floats y = rounded(x, {1, 7, 150}, {bits, 64, false, clip});
      for (int64_t row = 0; row < 7; ++row) {
        for (int64_t begin = 0; begin < 150; begin += 64) {
          const int64_t count = std::min<int64_t>(64, 150 - begin), at = row * 150 + begin;
          int8_t codes[64];
          float scale;
          plain_round({x.data() + at, count, bits, clip, false, codes, &scale});
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
  EXPECT_EQ(rounded({-8, 8, 2.4f, -0.6f}, {1, 1, 4}, {4, 4, true}), (Floats{-8, 7, 2, -1}));
  // m = +8: scale -1, so the range is -7..8.
  EXPECT_EQ(rounded({8, -8, 2.4f, -0.6f}, {1, 1, 4}, {4, 4, true}), (Floats{8, -7, 2, -1}));
  // Half of the range: what lies outside becomes its end.
  EXPECT_EQ(rounded({7, 1, -1, -7}, {1, 1, 4}, {4, 4, false, 0.5f}), (Floats{3.5f, 1, -1, -3.5f}));
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
    size_t k = at;
    for (size_t i = at; i < at + count; ++i) {
      if (std::fabs(x0[i]) > std::fabs(x0[k])) k = i;
    }
    const double half = 1 << (rounding.bits - 1);
    const double m = x[k] * clip;
    return rounding.full_range ? -m / half : std::fabs(m) / (half - 1);
  }
  Doubles operator()(const std::vector<Doubles>& in) const {
    const Doubles& x = in[0];
    const Doubles base(x0.begin(), x0.end());
    const double clip = in.size() > 1 ? in[1][0] : clip0;
    const double half = 1 << (rounding.bits - 1), low = rounding.full_range ? -half : 1 - half;
    Doubles y;
    for (int64_t row = 0; row < shape.batch * shape.rows; ++row) {
      for (int64_t begin = 0; begin < shape.cols; begin += rounding.group) {
        const size_t at = static_cast<size_t>(row * shape.cols + begin);
        const size_t count = static_cast<size_t>(std::min(rounding.group, shape.cols - begin));
        const double s0 = scale(base, at, count, clip0);
        const double s = frozen_scale ? s0 : scale(x, at, count, clip);
        for (size_t i = at; i < at + count; ++i) {
          const double v0 = base[i] / s0;
          const bool inside = v0 > low - 1e-6 && v0 < half - 1 + 1e-6;
          const double code = std::clamp(std::nearbyint(v0), low, half - 1);
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
    for (bool full_range : {false, true}) {
      for (float clip : {1.0f, 0.6f}) {
        const GroupRounding rounding = {bits, 4, full_range, clip};
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
