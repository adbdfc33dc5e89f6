// The tape itself, and the gradient of every plain operation against a double reference.
#include <gtest/gtest.h>

#include "model/error.h"
#include "tests/autodiff_cases.h"

namespace tq {
namespace {

// c[b] = op(a[b]) op(b[b]) in f64; an operand of batch 1 serves all.
Doubles multiply(const Doubles& a, Shape sa, bool ta, const Doubles& b, Shape sb, bool tb) {
  const int64_t batch = std::max(sa.batch, sb.batch);
  const int64_t rows = ta ? sa.cols : sa.rows, depth = ta ? sa.rows : sa.cols;
  const int64_t cols = tb ? sb.rows : sb.cols;
  Doubles c;
  for (int64_t e = 0; e < batch; ++e) {
    const double* x = a.data() + (sa.batch == 1 ? 0 : e * sa.matrix());
    const double* y = b.data() + (sb.batch == 1 ? 0 : e * sb.matrix());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < depth; ++k) {
          sum +=
              x[ta ? k * sa.cols + i : i * sa.cols + k] * y[tb ? j * sb.cols + k : k * sb.cols + j];
        }
        c.push_back(sum);
      }
    }
  }
  return c;
}

TEST(Matmul, GradientsOfAllOrdersAndBatches) {
  for (int order = 0; order < 3; ++order) {
    for (int batches = 0; batches < 4; ++batches) {
      const int64_t ba = batches & 1 ? 3 : 1, bb = batches & 2 ? 3 : 1;
      const bool ta = order == 2, tb = order == 0;
      const Shape a = ta ? Shape{ba, 7, 5} : Shape{ba, 5, 7};
      const Shape b = tb ? Shape{bb, 4, 7} : Shape{bb, 7, 4};
      check_gradients(
          {{a, b},
           [&](const std::vector<Var>& v) {
             return order == 0   ? matmul_nt(v[0], v[1])
                    : order == 1 ? matmul_nn(v[0], v[1])
                                 : matmul_tn(v[0], v[1]);
           },
           [&](const std::vector<Doubles>& x) { return multiply(x[0], a, ta, x[1], b, tb); },
           // Chains of at most 7 products and 15 rows, sums of 3 entries.
           24});
    }
  }
}

TEST(Fold, RightMultipliesBlocksOfColumns) {
  for (int64_t bw : {1, 2}) {
    for (int64_t bq : {1, 2}) {
      const Shape w = {bw, 5, 9}, q = {bq, 3, 3};
      check_gradients({{w, q},
                       [](const std::vector<Var>& v) { return fold_right(v[0], v[1]); },
                       [&](const std::vector<Doubles>& x) {
                         Doubles y;
                         for (int64_t i = 0; i < std::max(bw, bq) * 45; ++i) {
                           const int64_t e = i / 45, row = i / 9 % 5, col = i % 9;
                           double sum = 0;
                           for (int64_t k = 0; k < 3; ++k) {
                             sum += x[0][(bw == 1 ? 0 : e * 45) + row * 9 + col / 3 * 3 + k] *
                                    x[1][(bq == 1 ? 0 : e * 9) + k * 3 + col % 3];
                           }
                           y.push_back(sum);
                         }
                         return y;
                       },
                       32});  // chains of 5 rows, over 3 blocks and 2 entries
    }
  }
}

TEST(Fold, LeftMultipliesBlocksOfRowsByTheTranspose) {
  for (int64_t bw : {1, 2}) {
    for (int64_t bq : {1, 2}) {
      const Shape w = {bw, 6, 4}, q = {bq, 3, 3};
      check_gradients({{w, q},
                       [](const std::vector<Var>& v) { return fold_left(v[0], v[1]); },
                       [&](const std::vector<Doubles>& x) {
                         Doubles y;
                         for (int64_t i = 0; i < std::max(bw, bq) * 24; ++i) {
                           const int64_t e = i / 24, row = i / 4 % 6, col = i % 4;
                           double sum = 0;
                           for (int64_t k = 0; k < 3; ++k) {
                             sum += x[0][(bw == 1 ? 0 : e * 24) + (row / 3 * 3 + k) * 4 + col] *
                                    x[1][(bq == 1 ? 0 : e * 9) + k * 3 + row % 3];
                           }
                           y.push_back(sum);
                         }
                         return y;
                       },
                       32});
    }
  }
}

// An operation on element i of both operands.
GradientCase elementwise(Shape a, Shape b, std::function<Var(const Var&, const Var&)> op,
                         std::function<double(double, double)> reference) {
  return {{a, b},
          [op](const std::vector<Var>& v) { return op(v[0], v[1]); },
          [=](const std::vector<Doubles>& x) {
            Doubles y;
            for (int64_t i = 0; i < std::max(a.size(), b.size()); ++i) {
              y.push_back(reference(x[0][static_cast<size_t>(i % a.size())],
                                    x[1][static_cast<size_t>(i % b.size())]));
            }
            return y;
          }};
}

TEST(Elementwise, AddSubMulWithAndWithoutASharedOperand) {
  const Shape one = {1, 3, 5}, three = {3, 3, 5};
  for (const auto& [a, b] : {std::pair{one, one}, {three, three}, {one, three}, {three, one}}) {
    check_gradients(elementwise(a, b, add, [](double x, double y) { return x + y; }));
    check_gradients(elementwise(a, b, sub, [](double x, double y) { return x - y; }));
    check_gradients(elementwise(a, b, mul, [](double x, double y) { return x * y; }));
  }
}

TEST(Elementwise, SiluMul) {
  // exp within 2 eps, then 6 operations; slope s (1 + x (1 - s)) may cancel to 0 from 1.
  GradientCase c = elementwise({2, 3, 150}, {2, 3, 150}, silu_mul, [](double gate, double up) {
    return gate / (1 + std::exp(-gate)) * up;
  });
  c.shapes = {{1, 2, 150}, {1, 2, 150}};
  c.reference = [](const std::vector<Doubles>& x) {
    Doubles y;
    for (size_t i = 0; i < x[0].size(); ++i)
      y.push_back(x[0][i] / (1 + std::exp(-x[0][i])) * x[1][i]);
    return y;
  };
  c.jacobian_floor = 1.0 / 300;  // only one of the 300 outputs depends on an input
  check_gradients(c);
}

TEST(Elementwise, ScaleAndReshape) {
  check_gradients({{{2, 3, 4}},
                   [](const std::vector<Var>& v) {
                     return reshape(scale(v[0], -0.3f), {1, 4, 6});
                   },
                   [](const std::vector<Doubles>& x) {
                     Doubles y;
                     for (double v : x[0]) y.push_back(v * static_cast<double>(-0.3f));
                     return y;
                   }});
}

TEST(Elementwise, RowVectors) {
  for (int64_t batch : {1, 2}) {
    const Shape x = {2, 4, 5}, row = {batch, 1, 5};
    const auto row_at = [=](size_t i) { return (batch == 1 ? 0 : i / 20 * 5) + i % 5; };
    check_gradients({{x, row},
                     [](const std::vector<Var>& v) { return add_row(v[0], v[1]); },
                     [=](const std::vector<Doubles>& in) {
                       Doubles y;
                       for (size_t i = 0; i < 40; ++i) y.push_back(in[0][i] + in[1][row_at(i)]);
                       return y;
                     }});
    check_gradients({{x, row},
                     [](const std::vector<Var>& v) { return mul_row(v[0], v[1]); },
                     [=](const std::vector<Doubles>& in) {
                       Doubles y;
                       for (size_t i = 0; i < 40; ++i) y.push_back(in[0][i] * in[1][row_at(i)]);
                       return y;
                     }});
  }
}

TEST(RmsNorm, GradientGoesThroughTheRoot) {
  check_gradients({{{2, 3, 7}},
                   [](const std::vector<Var>& v) { return rms_norm(v[0], 0.01f); },
                   [](const std::vector<Doubles>& x) {
                     Doubles y;
                     for (size_t row = 0; row < 6; ++row) {
                       double squares = 0;
                       for (size_t j = 0; j < 7; ++j)
                         squares += x[0][row * 7 + j] * x[0][row * 7 + j];
                       const double root = std::sqrt(squares / 7 + static_cast<double>(0.01f));
                       for (size_t j = 0; j < 7; ++j) y.push_back(x[0][row * 7 + j] / root);
                     }
                     return y;
                   }});
}

TEST(Softmax, GradientOfEveryRow) {
  // The difference g - g.y: its terms are of the size of the cotangent times y.
  check_gradients({{{2, 3, 19}},
                   [](const std::vector<Var>& v) { return softmax(v[0]); },
                   [](const std::vector<Doubles>& x) {
                     Doubles y;
                     for (size_t row = 0; row < 6; ++row) {
                       double sum = 0;
                       for (size_t j = 0; j < 19; ++j) sum += std::exp(x[0][row * 19 + j]);
                       for (size_t j = 0; j < 19; ++j)
                         y.push_back(std::exp(x[0][row * 19 + j]) / sum);
                     }
                     return y;
                   },
                   24});
}

TEST(Hadamard, GradientIsTheInverseTransform) {
  Transform transform;
  transform.kind = Transform::Kind::kHadamard;
  transform.size = 24;
  transform.block = 12;
  std::vector<int8_t> signs(24);
  for (size_t i = 0; i < 24; ++i) signs[i] = i % 3 == 1 ? -1 : 1;
  transform.signs = signs.data();
  const FastTransform fast(transform);
  for (bool inverse : {false, true}) {
    // Linear: the reference is the matrix, read off with unit vectors.
    std::vector<Doubles> matrix;
    for (size_t i = 0; i < 24; ++i) {
      Floats unit(24);
      unit[i] = 1;
      fast.apply_row(kernels_for(CpuIsa::kPlain), unit.data(), inverse);
      matrix.emplace_back(unit.begin(), unit.end());
    }
    check_gradients({{{1, 2, 24}},
                     [&](const std::vector<Var>& v) { return hadamard(v[0], fast, inverse); },
                     [&](const std::vector<Doubles>& x) {
                       Doubles y(48);
                       for (size_t i = 0; i < 48; ++i) {
                         for (size_t j = 0; j < 24; ++j) {
                           y[i / 24 * 24 + j] += x[0][i] * matrix[i % 24][j];
                         }
                       }
                       return y;
                     },
                     32});
  }
}

TEST(Inverse, GradientOfEveryMatrix) {
  const Shape shape = {2, 3, 3};
  GradientCase c;
  c.shapes = {shape};
  c.on_tape = [](const std::vector<Var>& v) { return inverse(v[0]); };
  // 3 x 3 by cofactors.
  c.reference = [](const std::vector<Doubles>& x) {
    Doubles y;
    for (size_t e = 0; e < 2; ++e) {
      const auto m = [&](size_t i, size_t j) { return x[0][e * 9 + i % 3 * 3 + j % 3]; };
      const auto cofactor = [&](size_t i, size_t j) {
        return m(i + 1, j + 1) * m(i + 2, j + 2) - m(i + 1, j + 2) * m(i + 2, j + 1);
      };
      double det = 0;
      for (size_t j = 0; j < 3; ++j) det += m(0, j) * cofactor(0, j);
      for (size_t i = 0; i < 3; ++i) {
        for (size_t j = 0; j < 3; ++j) y.push_back(cofactor(j, i) / det);
      }
    }
    return y;
  };
  // In f64 inside; the value and the gradient are rounded once each.
  check_gradients(c);
}

TEST(Inverse, SingularMatrixIsAnError) {
  const Floats ones(4, 1.0f);
  Tape tape(kernels_for(best_isa()), 1);
  EXPECT_THROW(inverse(tape.constant({1, 2, 2}, ones.data())), Error);
}

TEST(Loss, SumSquares) {
  check_gradients({{{2, 3, 4}},
                   [](const std::vector<Var>& v) { return sum_squares(v[0]); },
                   [](const std::vector<Doubles>& x) {
                     double sum = 0;
                     for (double v : x[0]) sum += v * v;
                     return Doubles{sum};
                   }});
}

TEST(Loss, RelativeErrorOfATinyTargetHasAFiniteGradient) {
  for (float size : {1e-10f, 1e-20f, 1e-30f, 1e-42f, 0.0f}) {
    Floats target(12), values(12), gradient(12);
    for (size_t i = 0; i < 12; ++i) {
      target[i] = size * static_cast<float>(i + 1);
      values[i] = 0.75f * target[i];
    }
    Tape tape(kernels_for(best_isa()), 1);
    const Var y = tape.parameter({1, 3, 4}, values.data(), gradient.data());
    const Var loss = relative_error(y, tape.constant({1, 3, 4}, target.data()));
    // Below the floor of 1e-24 the loss fades away.
    if (size > 1e-24f) {
      EXPECT_NEAR(loss.item(), 0.0625f, 1e-6f) << size;
    }
    EXPECT_LE(loss.item(), 0.0626f);
    tape.backward(loss);
    for (size_t i = 0; i < 12; ++i) {
      EXPECT_TRUE(std::isfinite(gradient[i])) << size;
      // -2 (1/4) t_i / |t|^2, |t|^2 = 650 size^2
      if (size > 1e-24f) {
        const double exact = -0.5 * static_cast<double>(i + 1) / (650 * double{size});
        EXPECT_NEAR(double{gradient[i]} / exact, 1.0, 1e-5) << size;
      }
    }
  }
}

TEST(Loss, RelativeErrorWeighsEveryEntryByItsOwnTarget) {
  const Floats target = random_floats(24, 5, 3.0f);
  check_gradients({{{2, 3, 4}},
                   [&](const std::vector<Var>& v) {
                     return relative_error(v[0], v[0].tape().constant({2, 3, 4}, target.data()));
                   },
                   [&](const std::vector<Doubles>& x) {
                     double total = 0;
                     for (size_t e = 0; e < 2; ++e) {
                       double error = 0, size = 0;
                       for (size_t i = e * 12; i < e * 12 + 12; ++i) {
                         const double t = static_cast<double>(target[i]);
                         error += (x[0][i] - t) * (x[0][i] - t);
                         size += t * t;
                       }
                       total += error / size;
                     }
                     return Doubles{total};
                   }});
}

TEST(Tape, GradientsAddUpInTheCallersBuffer) {
  const Floats x = {2, 3};
  Floats gradient = {10, 20};
  Tape tape(kernels_for(best_isa()), 1);
  const Var v = tape.parameter({1, 1, 2}, x.data(), gradient.data());
  // d/dx of x^2 + x . x = 4 x
  tape.backward(add(sum_squares(v), matmul_nt(v, v)));
  EXPECT_EQ(gradient, (Floats{18, 32}));
}

TEST(Tape, DetachedValuesAndConstantsGetNoGradient) {
  const Floats x = {2, 3};
  Floats gradient(2);
  Tape tape(kernels_for(best_isa()), 1);
  const Var v = tape.parameter({1, 1, 2}, x.data(), gradient.data());
  EXPECT_FALSE(sum_squares(detach(v)).needs_gradient());
  tape.backward(matmul_nt(v, detach(v)));
  EXPECT_EQ(gradient, x);
}

TEST(Tape, MayBeFilledAgainButNotWithVarsFromBefore) {
  const Floats x = {2, 3};
  Floats gradient(2);
  Tape tape(kernels_for(best_isa()), 1);
  Var v = tape.parameter({1, 1, 2}, x.data(), gradient.data());
  tape.backward(sum_squares(v));
  EXPECT_THROW(tape.backward(sum_squares(v)), Error);
  v = tape.parameter({1, 1, 2}, x.data(), gradient.data());
  tape.backward(sum_squares(v));
  EXPECT_EQ(gradient, (Floats{8, 12}));
}

TEST(Tape, MemoryIsFreedWithTheLastUser) {
  const Floats x = random_floats(1000, 1);
  Floats gradient(1000);
  Tape tape(kernels_for(best_isa()), 1);
  const Var v = tape.parameter({1, 10, 100}, x.data(), gradient.data());
  Var y = scale(v, 2);
  y = scale(y, 3);  // keeps nothing, so its input goes
  y = scale(y, 4);
  EXPECT_EQ(tape.bytes(), 4000);
  EXPECT_EQ(tape.peak_bytes(), 8000);
  y = sum_squares(y);  // keeps its input
  EXPECT_EQ(tape.bytes(), 4004);
  tape.backward(y);
  EXPECT_EQ(tape.bytes(), 4);
  y = Var();
  EXPECT_EQ(tape.bytes(), 0);
}

// Three layers x <- x + silu_mul(x w, x u).
struct Stack {
  std::vector<Floats> weights, gradients;
  Floats x = random_floats(20 * 8, 11), x_gradient = Floats(20 * 8);
  int64_t peak = 0;
  explicit Stack(bool with_checkpoints) {
    for (uint32_t i = 0; i < 6; ++i) weights.push_back(random_floats(64, 20 + i, 0.3f));
    gradients.assign(6, Floats(64));
    Tape tape(kernels_for(best_isa()), 1);
    Var y = tape.parameter({1, 20, 8}, x.data(), x_gradient.data());
    for (size_t layer = 0; layer < 3; ++layer) {
      const CheckpointBody body = [this, layer](Tape& t, const std::vector<Var>& in) {
        const auto weight = [&](size_t i) {
          return t.parameter({1, 8, 8}, weights[i].data(), gradients[i].data());
        };
        const Var h =
            silu_mul(matmul_nt(in[0], weight(2 * layer)), matmul_nt(in[0], weight(2 * layer + 1)));
        return add(in[0], silu_mul(h, rms_norm(h, 1e-5f)));
      };
      y = with_checkpoints ? checkpoint(tape, body, {y}) : body(tape, {y});
    }
    tape.backward(sum_squares(y));
    peak = tape.peak_bytes();
  }
};

TEST(Checkpoint, FindsParametersMadeInsideAlsoOfANestedOne) {
  const Floats x = {2, 3}, w = {1, 4};
  Floats gradient(2);
  Tape tape(kernels_for(best_isa()), 1);
  const CheckpointBody inner = [&](Tape& t, const std::vector<Var>& in) {
    return mul(in[0], t.parameter({1, 1, 2}, w.data(), gradient.data()));
  };
  const CheckpointBody outer = [&](Tape& t, const std::vector<Var>& in) {
    return checkpoint(t, inner, in);
  };
  tape.backward(sum_squares(checkpoint(tape, outer, {tape.constant({1, 1, 2}, x.data())})));
  EXPECT_EQ(gradient, (Floats{8, 72}));  // 2 x^2 w
}

TEST(Checkpoint, SameGradientsFromLessMemory) {
  const Stack plain(false), saving(true);
  EXPECT_TRUE(same_numbers(plain.x_gradient, saving.x_gradient));
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_TRUE(same_numbers(plain.gradients[i], saving.gradients[i]));
    EXPECT_NE(saving.gradients[i], Floats(64));
  }
  // Three layers keep five tensors each (two products, h, its norm's input, the sum); with
  // checkpoints one layer does, the others one.
  EXPECT_LT(saving.peak * 10, plain.peak * 8);
}

}  // namespace
}  // namespace tq
