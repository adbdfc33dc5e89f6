// Packed linears: every code, both widths, exact small cases, all instruction sets bit-equal, no
// dependence on rows and threads, a double-precision reference with a derived bound.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "cpu/packed_matmul.h"
#include "tests/cpu_cases.h"

namespace tq {
namespace {

constexpr float kEps = 0x1.0p-24f;  // half a unit in the last place of f32, relative

// A linear that owns its matrices.
struct CaseLinear {
  CaseMatrix weight, branch_a, branch_b;
  Linear view;
};

struct Shape {
  int64_t rows, cols, group, act_group;
  Storage storage;
  int act_bits;
  int64_t rank = 0;
  Storage branch = Storage::kQ4;
  int64_t branch_group = 32;
  ActCodes codes = ActCodes::kSymmetric;
  bool two_level = false;
};

std::string describe(const Shape& s) {
  return std::to_string(s.rows) + "x" + std::to_string(s.cols) + " group " +
         std::to_string(s.group) + "/" + std::to_string(s.act_group) + " storage " +
         std::to_string(static_cast<int>(s.storage)) + " A" + std::to_string(s.act_bits) +
         " rank " + std::to_string(s.rank) + " branch " +
         std::to_string(static_cast<int>(s.branch)) + " codes " +
         std::to_string(static_cast<int>(s.codes)) + (s.two_level ? " two-level" : "");
}

std::unique_ptr<CaseLinear> make_linear(const Shape& s, uint32_t seed = 1) {
  auto linear = std::make_unique<CaseLinear>();
  linear->weight = CaseMatrix(s.storage, s.rows, s.cols, s.group, seed);
  linear->view.weight = linear->weight.view;
  linear->view.act = {s.act_bits, s.act_group, 0.95f, s.codes, s.two_level};
  if (s.rank > 0) {
    linear->branch_a = CaseMatrix(s.branch, s.rank, s.cols, s.group, seed + 1);
    linear->branch_b = CaseMatrix(s.branch, s.rows, s.rank, s.branch_group, seed + 2);
    linear->view.branch_a = linear->branch_a.view;
    linear->view.branch_b = linear->branch_b.view;
  }
  return linear;
}

// Codes and scales of one token, by the definition in model/weights.h.
struct Rounded {
  std::vector<int> codes;
  std::vector<float> scales;
};
Rounded round_reference(const float* x, int64_t cols, const ActQuant& act) {
  Rounded out;
  const float half = static_cast<float>(1 << (act.bits - 1)), qmax = half - 1;
  float largest = 0;
  for (int64_t i = 0; i < cols; ++i) largest = std::max(largest, std::fabs(x[i]));
  for (int64_t begin = 0; begin < cols; begin += act.group) {
    const int64_t end = std::min(cols, begin + act.group);
    const float* first = std::max_element(
        x + begin, x + end, [](float a, float b) { return std::fabs(a) < std::fabs(b); });
    const bool all = act.codes == ActCodes::kAll;
    float a = (all ? *first : std::fabs(*first)) * act.clip;
    float steps = all ? -half : qmax, low = all ? -half : -qmax;
    if (act.codes == ActCodes::kAsymmetric) {
      const float most = std::max(0.0f, *std::max_element(x + begin, x + end)) * act.clip;
      const float least = std::min(0.0f, *std::min_element(x + begin, x + end)) * act.clip;
      a = most - least;
      steps = 2 * half - 1;
      low = a != 0 ? -std::nearbyint(-least * (steps / a)) : 0;
    }
    const float high = act.codes == ActCodes::kAsymmetric ? low + steps : qmax;
    float inverse = a != 0 ? steps / a : 0, scale = a / steps;
    if (act.two_level && act.bits < 8 && largest != 0) {
      const float unit = largest * act.clip / std::fabs(steps) / 15;
      const float multiple = std::clamp(std::nearbyint(std::fabs(scale / unit)), 1.0f, 15.0f);
      scale = std::copysign(multiple * unit, a == 0 ? 1.0f : scale);
      inverse = 1 / scale;
    }
    for (int64_t i = begin; i < end; ++i) {
      const float code = std::nearbyint(x[i] * inverse);
      out.codes.push_back(static_cast<int>(std::clamp(code, low, high)));
    }
    out.scales.push_back(scale);
  }
  return out;
}

// The definition in packed_matmul.h, written from scratch: integers per inner group, one fma each.
float product_reference(const Rounded& x, const ActQuant& act, const Matrix& w, int64_t row) {
  // Parts of the greatest common divisor, where neither group is the whole row.
  const int64_t larger = std::max(act.group, w.group), smaller = std::min(act.group, w.group);
  const int64_t inner = larger >= w.cols ? std::min(smaller, w.cols) : std::gcd(larger, smaller);
  float sum = 0;
  for (int64_t begin = 0; begin < w.cols; begin += inner) {
    int dot = 0;
    for (int64_t i = begin; i < std::min(w.cols, begin + inner); ++i) {
      dot += x.codes[static_cast<size_t>(i)] * packed_code(w, row, i);
    }
    const float w_scale = f16_to_f32(w.scales[row * w.n_groups() + begin / w.group]);
    const float scale = x.scales[static_cast<size_t>(begin / act.group)] * w_scale;
    sum = std::fma(static_cast<float>(dot), scale, sum);
  }
  return sum;
}

std::vector<float> linear_reference(const Linear& linear, const std::vector<float>& x, int64_t n) {
  std::vector<float> y;
  for (int64_t t = 0; t < n; ++t) {
    const Rounded rounded =
        round_reference(x.data() + t * linear.in_dim(), linear.in_dim(), linear.act);
    std::vector<float> h;
    for (int64_t r = 0; r < linear.rank(); ++r) {
      h.push_back(product_reference(rounded, linear.act, *linear.branch_a, r));
    }
    ActQuant h_act = linear.act;
    h_act.clip = 1.0f;
    h_act.group = linear.rank() ? linear.branch_b->group : 1;
    if (linear.act.two_level && linear.act.bits == 8) h_act.group = linear.rank();
    const Rounded h_rounded = round_reference(h.data(), linear.rank(), h_act);
    for (int64_t row = 0; row < linear.out_dim(); ++row) {
      y.push_back(product_reference(rounded, linear.act, linear.weight, row));
      if (linear.rank()) y.back() += product_reference(h_rounded, h_act, *linear.branch_b, row);
    }
  }
  return y;
}

std::vector<Shape> many_shapes() {
  std::vector<Shape> shapes;
  for (Storage storage : {Storage::kQ4, Storage::kQ8}) {
    for (int bits : {3, 4, 8}) {
      shapes.push_back({48, 64, 32, 32, storage, bits});
      shapes.push_back({16, 32, 64, 64, storage, bits});     // one group, longer than the row
      shapes.push_back({33, 576, 128, 128, storage, bits});  // last group half empty
      shapes.push_back({40, 576, 64, 64, storage, bits});
      shapes.push_back({17, 172, 64, 64, storage, bits});   // 172 = 2 * 64 + 44
      shapes.push_back({17, 172, 32, 128, storage, bits});  // different groups
      shapes.push_back({31, 172, 128, 32, storage, bits});
      shapes.push_back({31, 576, 64, 96, storage, bits});   // parts of 32
      shapes.push_back({31, 172, 64, 172, storage, bits});  // one scale a token
      shapes.push_back({20, 192, 64, 192, storage, bits, 40, storage, 32});
      shapes.push_back({5, 640, 64, 32, storage, bits});
      shapes.push_back({1, 20, 64, 32, storage, bits});
      shapes.push_back({3, 13, 32, 32, storage, bits});  // odd number of columns
      shapes.push_back({100, 96, 64, 64, storage, bits});
      shapes.push_back({50, 192, 64, 64, storage, bits, 32, storage, 32});
      shapes.push_back({33, 172, 64, 64, storage, bits, 20, Storage::kQ8, 64});
      shapes.push_back({64, 96, 32, 32, storage, bits, 80, Storage::kQ4, 64});
      shapes.push_back({20, 192, 128, 32, storage, bits, 40, storage, 128});
      shapes.push_back({20, 192, 32, 128, storage, bits, 40, storage, 32});
    }
  }
  for (size_t i = 0, count = shapes.size(); i < count; ++i) {
    shapes.push_back(shapes[i]);
    shapes.back().codes = ActCodes::kAll;
    if (shapes[i].act_bits == 8) continue;
    shapes.push_back(shapes[i]);
    shapes.back().codes = ActCodes::kAsymmetric;
  }
  for (size_t i = 0, count = shapes.size(); i < count; ++i) {
    if (shapes[i].codes == ActCodes::kAsymmetric) continue;
    shapes.push_back(shapes[i]);
    shapes.back().two_level = true;
    if (shapes[i].act_bits == 8) shapes.back().act_group = shapes[i].cols;
  }
  return shapes;
}

TEST(PackedMatmul, AgreesWithTheDefinitionBitByBitOnEveryInstructionSet) {
  for (CpuIsa isa : supported_isas()) {
    CpuBackend backend(2, isa);
    for (const Shape& shape : many_shapes()) {
      const auto linear = make_linear(shape);
      for (int64_t n : {1, 2, 5, 13}) {
        const std::vector<float> x = random_floats(n * shape.cols, 7);
        ASSERT_TRUE(same_numbers(run_linear(backend, linear->view, x, n),
                                 linear_reference(linear->view, x, n)))
            << isa_name(isa) << " " << describe(shape) << " n " << n;
      }
    }
  }
}

TEST(PackedMatmul, DoesNotDependOnRowsComputedTogether) {
  for (CpuIsa isa : supported_isas()) {
    CpuBackend backend(1, isa);
    const auto linear = make_linear({70, 172, 64, 64, Storage::kQ4, 8, 32});
    const std::vector<float> x = random_floats(64 * 172, 3);
    const std::vector<float> all = run_linear(backend, linear->view, x, 64);
    for (int64_t n : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 23, 24, 25}) {
      const std::vector<float> part(x.begin() + 5 * 172, x.begin() + (5 + n) * 172);
      const std::vector<float> expected(all.begin() + 5 * 70, all.begin() + (5 + n) * 70);
      ASSERT_TRUE(same_numbers(run_linear(backend, linear->view, part, n), expected)) << n;
    }
  }
}

TEST(PackedMatmul, DoesNotDependOnThreads) {
  const auto linear = make_linear({300, 256, 64, 64, Storage::kQ4, 4, 32});
  for (int64_t n : {1, 7, 64}) {
    const std::vector<float> x = random_floats(n * 256, 4);
    CpuBackend one(1);
    const std::vector<float> expected = run_linear(one, linear->view, x, n);
    for (int threads : {2, 3, 5, 8}) {
      CpuBackend backend(threads);
      ASSERT_TRUE(same_numbers(run_linear(backend, linear->view, x, n), expected)) << threads;
    }
  }
}

constexpr ActCodes kAllCodes[] = {ActCodes::kSymmetric, ActCodes::kAll, ActCodes::kAsymmetric};

// One weight code in column 0, everything else zero: y = code * scale exactly.
void check_every_code(Storage storage, int lowest, int highest, ActCodes codes) {
  constexpr int64_t kCols = 32;
  const int64_t rows = highest - lowest + 1;
  CaseMatrix w(storage, rows, kCols, 32, 1);
  const uint16_t one = f32_to_f16(1.0f);
  std::fill(w.scales.begin(), w.scales.end(), one);
  for (int64_t row = 0; row < rows; ++row) {
    std::byte* begin = w.data.data() + row * w.view.row_bytes();
    const int code = lowest + static_cast<int>(row);
    if (storage == Storage::kQ4) {
      std::fill_n(begin, w.view.row_bytes(), std::byte{0x88});
      begin[0] = static_cast<std::byte>(0x80 | (code + 8));
    } else {
      std::fill_n(begin, w.view.row_bytes(), std::byte{0});
      begin[0] = static_cast<std::byte>(code);
    }
  }
  for (int bits : {3, 4, 8}) {
    if (codes == ActCodes::kAsymmetric && bits == 8) continue;
    const int qmax = (1 << (bits - 1)) - 1, qmin = codes == ActCodes::kAll ? -qmax - 1 : -qmax;
    Linear linear;
    linear.weight = w.view;
    linear.act = {bits, 32, 1.0f, codes};
    for (CpuIsa isa : supported_isas()) {
      CpuBackend backend(1, isa);
      // Asymmetric codes reach from -qmax' to qmax', as wide as the range beside them allows.
      const int reach = 2 * qmax + 1;
      const bool asymmetric = codes == ActCodes::kAsymmetric;
      // The token's largest magnitude is that of qmin, or its range is `reach` steps, so its scale
      // is exactly 1 and column 0 holds the code `a`.
      for (int a = asymmetric ? -reach : qmin; a <= (asymmetric ? reach : qmax); ++a) {
        std::vector<float> x(kCols, 0.0f);
        x[0] = static_cast<float>(a);
        x[1] = static_cast<float>(asymmetric ? (a < 0 ? a + reach : a - reach) : qmin);
        const std::vector<float> y = run_linear(backend, linear, x, 1);
        for (int64_t row = 0; row < rows; ++row) {
          ASSERT_EQ(y[static_cast<size_t>(row)], static_cast<float>(a * (lowest + row)))
              << isa_name(isa) << " A" << bits << " a " << a << " row " << row;
        }
      }
    }
  }
}
TEST(PackedMatmul, EveryFourBitCodeTimesEveryActivationCodeIsExact) {
  for (ActCodes codes : kAllCodes) check_every_code(Storage::kQ4, -8, 7, codes);
}
TEST(PackedMatmul, EveryEightBitCodeTimesEveryActivationCodeIsExact) {
  for (ActCodes codes : kAllCodes) check_every_code(Storage::kQ8, -127, 127, codes);
}

TEST(PackedMatmul, ExtremeCodesDoNotOverflow) {
  // All weights at the lowest or highest code, all activations at +-127, or all of them -128 with a
  // scale of either sign: the largest sums there are. Asymmetric: all +-15.
  for (Storage storage : {Storage::kQ4, Storage::kQ8}) {
    for (bool low : {false, true}) {
      CaseMatrix w(storage, 16, 128, 128, 1);
      std::fill(w.scales.begin(), w.scales.end(), f32_to_f16(1.0f));
      const int code = storage == Storage::kQ4 ? (low ? -8 : 7) : (low ? -127 : 127);
      const int byte = storage == Storage::kQ4 ? (code + 8) * 17 : code;
      std::fill(w.data.begin(), w.data.end(), static_cast<std::byte>(byte));
      Linear linear;
      linear.weight = w.view;
      linear.act = {8, 128, 1.0f};
      for (float value : {-127.0f, 127.0f, -128.0f, 128.0f, -15.0f, 15.0f}) {
        linear.act.codes = kAllCodes[std::fabs(value) == 15.0f ? 2 : std::fabs(value) == 128.0f];
        linear.act.bits = std::fabs(value) == 15.0f ? 4 : 8;
        const std::vector<float> x(4 * 128, value);
        for (CpuIsa isa : supported_isas()) {
          CpuBackend backend(1, isa);
          for (float y : run_linear(backend, linear, x, 4)) {
            ASSERT_EQ(y, value * static_cast<float>(code) * 128.0f) << isa_name(isa);
          }
        }
      }
    }
  }
}

TEST(PackedMatmul, RoundsTiesToEvenAndClampsToTheClippedRange) {
  CaseMatrix w(Storage::kQ8, 1, 32, 32, 1);
  w.scales[0] = f32_to_f16(1.0f);
  Linear linear;
  linear.weight = w.view;
  linear.act = {4, 32, 1.0f};
  std::vector<float> x(32, 0.0f);
  x[0] = 7.0f;
  const float values[] = {0.5f, 1.5f, 2.5f, -0.5f, -3.5f, 6.49f};
  const float codes[] = {0, 2, 2, 0, -4, 6};
  for (CpuIsa isa : supported_isas()) {
    CpuBackend backend(1, isa);
    for (size_t i = 0; i < 6; ++i) {
      std::fill(w.data.begin(), w.data.end(), std::byte{0});
      w.data[1] = std::byte{1};
      x[1] = values[i];
      ASSERT_EQ(run_linear(backend, linear, x, 1)[0], codes[i]) << isa_name(isa) << " " << i;
    }
    // clip 0.5: scale 0.5, and 7 is cut to 3.5.
    Linear clipped = linear;
    clipped.act.clip = 0.5f;
    std::fill(w.data.begin(), w.data.end(), std::byte{0});
    w.data[0] = std::byte{1};
    ASSERT_EQ(run_linear(backend, clipped, x, 1)[0], 3.5f);
  }
}

TEST(PackedMatmul, ZeroTokenGivesZeroAndNanReachesTheOutput) {
  const auto linear = make_linear({20, 64, 32, 32, Storage::kQ4, 8});
  linear->view.act.bits = 4;
  for (ActCodes codes : kAllCodes) {
    linear->view.act.codes = codes;
    for (CpuIsa isa : supported_isas()) {
      CpuBackend backend(1, isa);
      std::vector<float> x(64, 0.0f);
      for (float y : run_linear(backend, linear->view, x, 1)) ASSERT_EQ(y, 0.0f);
      x[40] = std::numeric_limits<float>::quiet_NaN();
      for (float y : run_linear(backend, linear->view, x, 1)) ASSERT_TRUE(std::isnan(y));
    }
  }
}

TEST(PackedMatmul, FullRangeUsesEveryCodeAndTakesTheFirstOfEqualMagnitudes) {
  // 4 bits, largest magnitude 8: scale 1 with -8 first, -1 with +8 first. The other one cannot have
  // its code 8 and becomes 7. Columns 1..3 show ties to even.
  CaseMatrix w(Storage::kQ8, 6, 32, 32, 1);
  std::fill(w.data.begin(), w.data.end(), std::byte{0});
  std::fill(w.scales.begin(), w.scales.end(), f32_to_f16(1.0f));
  for (size_t i = 0; i < 6; ++i) w.data[i * 32 + i] = std::byte{1};  // y = x
  Linear linear;
  linear.weight = w.view;
  linear.act = {4, 32, 1.0f, ActCodes::kAll};
  for (float sign : {1.0f, -1.0f}) {
    std::vector<float> x(32, 0.0f), expected(6);
    const float values[] = {-8.0f, 0.5f, 1.5f, -2.5f, 7.4f, 8.0f}, read[] = {-8, 0, 2, -2, 7, 7};
    for (size_t i = 0; i < 6; ++i) x[i] = sign * values[i], expected[i] = sign * read[i];
    for (CpuIsa isa : supported_isas()) {
      CpuBackend backend(1, isa);
      ASSERT_TRUE(same_numbers(run_linear(backend, linear, x, 1), expected)) << isa_name(isa);
    }
  }
  // clip 0.5: scale 0.5, codes -8..7 reach from -4 to 3.5.
  linear.act.clip = 0.5f;
  std::vector<float> x(32, 0.0f);
  x[0] = -8.0f, x[1] = 8.0f, x[2] = 1.0f;
  for (CpuIsa isa : supported_isas()) {
    CpuBackend backend(1, isa);
    ASSERT_TRUE(same_numbers(run_linear(backend, linear, x, 1), {-4.0f, 3.5f, 1.0f, 0, 0, 0}));
  }
}

TEST(PackedMatmul, AsymmetricCodesReachFromTheLeastToTheGreatestValue) {
  CaseMatrix w(Storage::kQ8, 6, 32, 32, 1);
  std::fill(w.data.begin(), w.data.end(), std::byte{0});
  std::fill(w.scales.begin(), w.scales.end(), f32_to_f16(1.0f));
  for (size_t i = 0; i < 6; ++i) w.data[i * 32 + i] = std::byte{1};  // y = x
  struct {
    float clip;
    std::vector<float> values, read;
  } const cases[] = {
      // 15 steps of 1 from -4 to 11; ties to even.
      {1.0f, {-4, 11, 0.5f, 1.5f, -2.5f, 10.4f}, {-4, 11, 0, 2, -2, 10}},
      // 0 is always in the range: from 0 to 15, and from -15 to 0.
      {1.0f, {15, 3, 2.6f, 7, 8, 9}, {15, 3, 3, 7, 8, 9}},
      {1.0f, {-15, -3, -2.6f, -7, -8, -9}, {-15, -3, -3, -7, -8, -9}},
      // From -3.4 to 11.6: z = round(3.4) = 3, so the codes are -3..12 and -3.4 loses a little.
      {1.0f, {-3.4f, 11.6f, 1, 0, 0, 0}, {-3, 12, 1, 0, 0, 0}},
      // Clip 0.5 halves both ends: 15 steps of 0.5 from -2 to 5.5.
      {0.5f, {-4, 11, 1, 5.2f, -2.2f, 0}, {-2, 5.5f, 1, 5, -2, 0}}};
  for (const auto& c : cases) {
    Linear linear;
    linear.weight = w.view;
    linear.act = {4, 32, c.clip, ActCodes::kAsymmetric};
    std::vector<float> x(32, 0.0f);
    std::copy(c.values.begin(), c.values.end(), x.begin());
    for (CpuIsa isa : supported_isas()) {
      CpuBackend backend(1, isa);
      const std::vector<float> y = run_linear(backend, linear, x, 1);
      // The range is a sum and a quotient of floats: a scale of 1 within 3 roundings.
      for (size_t i = 0; i < 6; ++i) {
        EXPECT_NEAR(y[i], c.read[i], 3 * kEps * std::fabs(c.read[i])) << isa_name(isa) << " " << i;
      }
    }
  }
}

void expect_within_bound(const Shape& shape) {
  const auto linear = make_linear(shape);
  const int64_t n = 13, inner = std::min(shape.group, shape.act_group);
  const int64_t n_inner = (shape.cols + inner - 1) / inner;
  const std::vector<float> x = random_floats(n * shape.cols, 5);
  CpuBackend backend(1);
  const std::vector<float> y = run_linear(backend, linear->view, x, n);
  for (int64_t t = 0; t < n; ++t) {
    const Rounded rounded =
        round_reference(x.data() + t * shape.cols, shape.cols, linear->view.act);
    for (int64_t row = 0; row < shape.rows; ++row) {
      const std::vector<float> w = linear->weight.row(row);
      double exact = 0, bound = 0;
      for (int64_t g = 0; g < n_inner; ++g) {
        double term = 0;
        for (int64_t i = inner * g; i < std::min(shape.cols, inner * (g + 1)); ++i) {
          term += static_cast<double>(w[static_cast<size_t>(i)]) *
                  rounded.codes[static_cast<size_t>(i)] *
                  static_cast<double>(rounded.scales[static_cast<size_t>(i / shape.act_group)]);
        }
        exact += term;
        bound += std::fabs(term);
      }
      // matrix_row_f32 rounds scale * code once more: one eps.
      ASSERT_NEAR(y[static_cast<size_t>(t * shape.rows + row)], exact,
                  static_cast<double>(n_inner + 3) * kEps * bound);
    }
  }
}

TEST(PackedMatmul, IsWithinTheBoundOfADoubleReference) {
  // Against exact arithmetic on the rounded operands: G groups, each term rounded by its scale
  // product (1 eps) and by the fma chain (at most G eps of the running sum), so
  // |error| <= (G + 2) eps sum_g |dot_g| s_g. The groups are the common parts of the two kinds.
  const Shape shapes[] = {
      {64, 576, 64, 64, Storage::kQ4, 8},
      {64, 576, 128, 32, Storage::kQ4, 8},
      {64, 576, 64, 32, Storage::kQ4, 4, 0, Storage::kQ4, 0, ActCodes::kAll},
      {64, 576, 32, 128, Storage::kQ8, 3, 0, Storage::kQ4, 0, ActCodes::kAll},
      {64, 576, 64, 576, Storage::kQ4, 4, 0, Storage::kQ4, 0, ActCodes::kAsymmetric}};
  for (const Shape& shape : shapes) expect_within_bound(shape);
}

TEST(PackedMatmul, UnroundedInputUsesTheDequantizedWeights) {
  for (Storage storage : {Storage::kQ4, Storage::kQ8}) {
    for (int64_t cols : {32, 172, 576, 13}) {
      const auto linear = make_linear({37, cols, 64, 64, storage, 16, 20, storage, 64});
      CaseLinear dense = {};
      const auto widen = [](const CaseMatrix& from) {
        CaseMatrix to(Storage::kF32, from.view.rows, from.view.cols, 0, 1);
        for (int64_t row = 0; row < from.view.rows; ++row) {
          matrix_row_f32(from.view, row,
                         reinterpret_cast<float*>(to.data.data()) + row * from.view.cols);
        }
        return to;
      };
      dense.weight = widen(linear->weight);
      dense.branch_a = widen(linear->branch_a);
      dense.branch_b = widen(linear->branch_b);
      dense.view.weight = dense.weight.view;
      dense.view.branch_a = dense.branch_a.view;
      dense.view.branch_b = dense.branch_b.view;
      for (CpuIsa isa : supported_isas()) {
        CpuBackend backend(2, isa);
        for (int64_t n : {1, 30}) {
          const std::vector<float> x = random_floats(n * cols, 6);
          ASSERT_TRUE(same_numbers(run_linear(backend, linear->view, x, n),
                                   run_linear(backend, dense.view, x, n)))
              << isa_name(isa) << " cols " << cols << " n " << n;
        }
      }
    }
  }
}

TEST(PackedMatmul, DenseBranchReadsTheUnroundedInput) {
  const Shape shape = {40, 96, 32, 32, Storage::kQ4, 4, 16, Storage::kBF16, 0};
  const auto linear = make_linear(shape);
  Linear residual = linear->view;
  residual.branch_a = residual.branch_b = std::nullopt;
  for (CpuIsa isa : supported_isas()) {
    CpuBackend backend(2, isa);
    for (int64_t n : {1, 30}) {
      const std::vector<float> x = random_floats(n * shape.cols, 8);
      Linear a = {}, b = {};
      a.weight = linear->branch_a.view;
      b.weight = linear->branch_b.view;
      const std::vector<float> h = run_linear(backend, a, x, n);
      const std::vector<float> up = run_linear(backend, b, h, n);
      std::vector<float> expected = run_linear(backend, residual, x, n);
      for (size_t i = 0; i < expected.size(); ++i) expected[i] += up[i];
      ASSERT_TRUE(same_numbers(run_linear(backend, linear->view, x, n), expected));
    }
  }
}

TEST(PackedMatmul, DenseWeightWithRoundedInputReadsTheRoundedValues) {
  CaseMatrix w(Storage::kF32, 24, 80, 0, 9);
  Linear linear = {};
  linear.weight = w.view;
  linear.act = {4, 32, 0.9f};
  const int64_t n = 3;
  const std::vector<float> x = random_floats(n * 80, 10);
  std::vector<float> rounded;
  for (int64_t t = 0; t < n; ++t) {
    const Rounded r = round_reference(x.data() + t * 80, 80, linear.act);
    for (size_t i = 0; i < 80; ++i)
      rounded.push_back(r.scales[i / 32] * static_cast<float>(r.codes[i]));
  }
  Linear plain = linear;
  plain.act.bits = 16;
  for (CpuIsa isa : supported_isas()) {
    CpuBackend backend(1, isa);
    ASSERT_TRUE(
        same_numbers(run_linear(backend, linear, x, n), run_linear(backend, plain, rounded, n)));
  }
}

TEST(PackedMatmul, LinearsOfOneCallMayRoundDifferently) {
  const auto a = make_linear({48, 128, 64, 64, Storage::kQ4, 4, 16}, 1);
  const auto b = make_linear({16, 128, 32, 32, Storage::kQ4, 8}, 11);
  const auto c = make_linear({24, 128, 64, 128, Storage::kQ8, 8, 16}, 21);
  CaseMatrix kept(Storage::kBF16, 20, 128, 0, 31);
  Linear d = {};
  d.weight = kept.view;
  for (CpuIsa isa : supported_isas()) {
    CpuBackend backend(2, isa);
    for (int64_t n : {1, 29}) {
      const std::vector<float> x = random_floats(n * 128, 12);
      const BufferPtr input = to_device(backend, x);
      const Linear* linears[] = {&a->view, &b->view, &c->view, &d};
      std::vector<std::unique_ptr<PreparedLinear>> prepared;
      std::vector<BufferPtr> outputs;
      std::vector<const PreparedLinear*> weights;
      std::vector<DeviceBuffer*> out;
      for (const Linear* linear : linears) {
        prepared.push_back(backend.prepare(*linear));
        outputs.push_back(backend.alloc(n * linear->out_dim()));
        weights.push_back(prepared.back().get());
        out.push_back(outputs.back().get());
      }
      backend.linears(weights, *input, n, out);
      for (size_t i = 0; i < 4; ++i) {
        ASSERT_TRUE(same_numbers(to_host(backend, *outputs[i], n * linears[i]->out_dim()),
                                 run_linear(backend, *linears[i], x, n)))
            << "linear " << i << " n " << n;
      }
    }
  }
}

TEST(PackedMatmul, RefusesGroupsThatDoNotFitEachOther) {
  const auto odd = make_linear({16, 192, 20, 64, Storage::kQ4, 8});  // parts of 4
  CpuBackend backend(1);
  EXPECT_THROW(backend.prepare(odd->view), Error);
  const auto tiny = make_linear({16, 192, 4, 64, Storage::kQ4, 8});
  EXPECT_THROW(backend.prepare(tiny->view), Error);
}

}  // namespace
}  // namespace tq
