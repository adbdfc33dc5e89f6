// autodiff_cases - gradients of an operation against its double-precision reference.
//
// The reference computes the value in f64; its Jacobian J comes from central differences, which in
// f64 are exact to some 1e-9. For a random cotangent G the tape must give sum_i G_i J_ij, within
// `roundings` times the unit roundoff of f32 times sum_i |G_i| |J_ij|.
#pragma once

#include <gtest/gtest.h>

#include <functional>

#include "cpu/autodiff_ops.h"
#include "tests/cpu_cases.h"

namespace tq {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

struct GradientCase {
  std::vector<Shape> shapes;                                      // of the inputs
  std::function<Var(const std::vector<Var>&)> on_tape;            // the operation
  std::function<Doubles(const std::vector<Doubles>&)> reference;  // the same in f64
  double roundings = 16;                                          // of a term of a sum
  std::function<float(size_t input, float)> prepare = {};         // of random inputs
  double jacobian_floor = 0;  // |J| that cancels inside an element: adds to sum |G| |J|
};

inline std::vector<Floats> case_inputs(const GradientCase& c, uint32_t seed) {
  std::vector<Floats> inputs;
  for (size_t i = 0; i < c.shapes.size(); ++i) {
    inputs.push_back(random_floats(c.shapes[i].size(), seed + static_cast<uint32_t>(i)));
    for (float& value : inputs.back()) value = c.prepare ? c.prepare(i, value) : value;
  }
  return inputs;
}

struct TapeRun {
  Floats value;
  Shape shape;
  std::vector<Floats> gradients;  // of sum(cotangent * value), one for each input
};

// Gradients of leaves are added to the caller's zeros; `behind_nodes`, the operation's gradients go
// into new memory instead, and must be the same.
inline TapeRun run_tape(const GradientCase& c, const std::vector<Floats>& inputs, int threads,
                        CpuIsa isa, bool behind_nodes) {
  TapeRun run;
  Tape tape(kernels_for(isa), threads);
  std::vector<Var> vars;
  for (const Floats& input : inputs) run.gradients.emplace_back(input.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Var leaf = tape.parameter(c.shapes[i], inputs[i].data(), run.gradients[i].data());
    vars.push_back(behind_nodes ? scale(leaf, 1.0f) : leaf);
  }
  const Var y = c.on_tape(vars);
  run.shape = y.shape();
  run.value.assign(y.data(), y.data() + y.shape().size());
  const Floats cotangent = random_floats(y.shape().size(), 99);
  tape.backward(y, Tensor(y.shape(), cotangent.data()));
  return run;
}

inline void check_gradients(const GradientCase& c, uint32_t seed = 1) {
  const std::vector<Floats> inputs = case_inputs(c, seed);
  const TapeRun run = run_tape(c, inputs, 1, best_isa(), false);
  std::vector<Doubles> x;
  for (const Floats& input : inputs) x.emplace_back(input.begin(), input.end());
  const Doubles value = c.reference(x);
  ASSERT_EQ(value.size(), run.value.size());
  double largest = 0;
  for (double v : value) largest = std::max(largest, std::fabs(v));
  for (size_t i = 0; i < value.size(); ++i) {
    ASSERT_NEAR(run.value[i], value[i], c.roundings * 0x1.0p-24 * largest) << "value " << i;
  }
  const Floats cotangent = random_floats(static_cast<int64_t>(value.size()), 99);
  const double h = 1e-5;
  for (size_t input = 0; input < x.size(); ++input) {
    for (size_t j = 0; j < x[input].size(); ++j) {
      const double at = x[input][j];
      x[input][j] = at + h;
      const Doubles above = c.reference(x);
      x[input][j] = at - h;
      const Doubles below = c.reference(x);
      x[input][j] = at;
      double exact = 0, size = 0;
      for (size_t i = 0; i < value.size(); ++i) {
        const double slope = (above[i] - below[i]) / (2 * h);
        exact += static_cast<double>(cotangent[i]) * slope;
        size +=
            std::fabs(static_cast<double>(cotangent[i])) * (std::fabs(slope) + c.jacobian_floor);
      }
      // Central differences: h^2 of the third derivative and 1e-16 / h of the value, below 1e-8.
      ASSERT_NEAR(run.gradients[input][j], exact,
                  c.roundings * 0x1.0p-24 * size + 1e-8 * (1 + largest))
          << "input " << input << " element " << j;
    }
  }
  for (CpuIsa isa : supported_isas()) {
    for (int threads : {1, 2, 3}) {
      const TapeRun other = run_tape(c, inputs, threads, isa, threads == 2);
      ASSERT_TRUE(same_numbers(other.value, run.value)) << isa_name(isa) << " " << threads;
      for (size_t i = 0; i < inputs.size(); ++i) {
        ASSERT_TRUE(same_numbers(other.gradients[i], run.gradients[i]))
            << isa_name(isa) << " " << threads << " input " << i;
      }
    }
  }
}

}  // namespace tq
