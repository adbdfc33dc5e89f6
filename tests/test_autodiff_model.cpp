// Embedding, positions, attention and losses on the tape, and a whole layer of a transformer.
#include <gtest/gtest.h>

#include "cpu/autodiff_model.h"
#include "cpu/autodiff_rounding.h"
#include "tests/autodiff_cases.h"

namespace tq {
namespace {

TEST(GatherRows, GradientAddsUpWhereATokenOccursTwice) {
  const std::vector<int32_t> tokens = {2, 0, 2};
  check_gradients({{{1, 4, 3}},
                   [&](const std::vector<Var>& v) { return gather_rows(v[0], tokens); },
                   [&](const std::vector<Doubles>& x) {
                     Doubles y;
                     for (int32_t token : tokens) {
                       for (size_t j = 0; j < 3; ++j) {
                         y.push_back(x[0][static_cast<size_t>(token) * 3 + j]);
                       }
                     }
                     return y;
                   }});
}

RopeTable small_table(size_t half) {
  RopeTable table;
  for (size_t i = 0; i < half; ++i) table.inv_freq.push_back(1.0f / static_cast<float>(1 + 3 * i));
  table.attention_factor = 1.5f;
  return table;
}

Doubles rope_reference(const Doubles& x, const RopeTable& table, size_t rows, size_t n_heads,
                       size_t length) {
  const size_t half = table.inv_freq.size();
  Doubles y(x.size());
  for (size_t i = 0; i < rows * n_heads; ++i) {
    for (size_t j = 0; j < half; ++j) {
      const size_t a = i * 2 * half + j, b = a + half;
      const float angle = static_cast<float>(i / n_heads % length) * table.inv_freq[j];
      const double c = std::cos(double{angle}) * double{table.attention_factor};
      const double s = std::sin(double{angle}) * double{table.attention_factor};
      y[a] = x[a] * c - x[b] * s;
      y[b] = x[b] * c + x[a] * s;
    }
  }
  return y;
}

TEST(Rope, EveryTextBeginsAtPositionZero) {
  const RopeTable table = small_table(3);
  check_gradients(
      {{{1, 6, 12}},  // 2 texts of 3 tokens, 2 heads
       [&](const std::vector<Var>& v) { return rope(v[0], table, 2, 2); },
       [&](const std::vector<Doubles>& x) { return rope_reference(x[0], table, 6, 2, 3); }});
}

Doubles attention_reference(const Doubles& q, const Doubles& k, const Doubles& v, size_t rows,
                            size_t n_heads, size_t n_kv_heads, size_t n_texts) {
  const size_t length = rows / n_texts, q_cols = q.size() / rows, kv_cols = k.size() / rows;
  const size_t dim = q_cols / n_heads;
  Doubles out(q.size());
  for (size_t row = 0; row < rows; ++row) {
    for (size_t head = 0; head < n_heads; ++head) {
      const size_t text = row / length * length, kv = head / (n_heads / n_kv_heads) * dim;
      Doubles p;
      double sum = 0;
      for (size_t key = text; key <= row; ++key) {
        double score = 0;
        for (size_t i = 0; i < dim; ++i) {
          score += q[row * q_cols + head * dim + i] * k[key * kv_cols + kv + i];
        }
        p.push_back(std::exp(score / std::sqrt(static_cast<double>(dim))));
        sum += p.back();
      }
      for (size_t key = text; key <= row; ++key) {
        for (size_t i = 0; i < dim; ++i) {
          out[row * q_cols + head * dim + i] += p[key - text] / sum * v[key * kv_cols + kv + i];
        }
      }
    }
  }
  return out;
}

TEST(CausalAttention, GradientsOfQueriesKeysAndValues) {
  GradientCase c;
  c.shapes = {{1, 8, 12}, {1, 8, 6}, {1, 8, 6}};  // 2 texts of 4, 4 heads on 2 key heads
  c.on_tape = [](const std::vector<Var>& v) {
    return causal_attention(v[0], v[1], v[2], {4, 2, 2});
  };
  c.reference = [](const std::vector<Doubles>& x) {
    return attention_reference(x[0], x[1], x[2], 8, 4, 2, 2);
  };
  // A weight has the error of its score (3 products of up to 3, so 10 eps) and of exp; P (dP - D)
  // cancels, with |dP|, |D| up to |dO| |V| = 3.
  c.roundings = 64;
  c.jacobian_floor = 0.01;
  check_gradients(c);
}

// More queries than a block of 64: value and the slope along one random direction.
TEST(CausalAttention, BlocksOfQueriesJoin) {
  const size_t rows = 150;
  std::vector<Floats> in;
  for (uint32_t i = 0; i < 3; ++i) in.push_back(random_floats(150 * 4, 40 + i));
  const Floats cotangent = random_floats(150 * 4, 50);
  std::vector<Floats> gradients(3, Floats(600));
  Tape tape(kernels_for(best_isa()), 2);
  std::vector<Var> v;
  for (size_t i = 0; i < 3; ++i) {
    v.push_back(tape.parameter({1, 150, 4}, in[i].data(), gradients[i].data()));
  }
  const Var y = causal_attention(v[0], v[1], v[2], {1, 1, 1});
  const auto reference = [&](double step) {
    std::vector<Doubles> x(3, Doubles(600));
    for (size_t i = 0; i < 3; ++i) {
      for (size_t j = 0; j < 600; ++j) {
        x[i][j] = double{in[i][j]} + step * double{cotangent[(j + 7 * i) % 600]};
      }
    }
    return attention_reference(x[0], x[1], x[2], rows, 1, 1, 1);
  };
  const Doubles value = reference(0), above = reference(1e-5), below = reference(-1e-5);
  for (size_t i = 0; i < 600; ++i) ASSERT_NEAR(y.data()[i], value[i], 64 * 0x1.0p-24 * 4);
  tape.backward(y, Tensor({1, 150, 4}, cotangent.data()));
  double exact = 0, slope = 0, size = 0;
  for (size_t i = 0; i < 600; ++i) {
    exact += double{cotangent[i]} * (above[i] - below[i]) / 2e-5;
    for (size_t j = 0; j < 3; ++j) {
      const double term = double{gradients[j][i]} * double{cotangent[(i + 7 * j) % 600]};
      slope += term;
      size += std::fabs(term);
    }
  }
  EXPECT_NEAR(slope, exact, 64 * 0x1.0p-24 * size);  // as above, for each term
}

Doubles cross_entropy_reference(const Doubles& logits, const std::vector<int32_t>& targets) {
  const size_t vocab = logits.size() / targets.size();
  double loss = 0;
  for (size_t row = 0; row < targets.size(); ++row) {
    double sum = 0;
    for (size_t j = 0; j < vocab; ++j) sum += std::exp(logits[row * vocab + j]);
    loss += std::log(sum) - logits[row * vocab + static_cast<size_t>(targets[row])];
  }
  return {loss / static_cast<double>(targets.size())};
}

Doubles kl_reference(const Doubles& reference, const Doubles& logits, size_t rows) {
  const size_t vocab = logits.size() / rows;
  double loss = 0;
  for (size_t row = 0; row < rows; ++row) {
    double sum_r = 0, sum_l = 0;
    for (size_t j = row * vocab; j < (row + 1) * vocab; ++j) {
      sum_r += std::exp(reference[j]);
      sum_l += std::exp(logits[j]);
    }
    for (size_t j = row * vocab; j < (row + 1) * vocab; ++j) {
      const double log_p = reference[j] - std::log(sum_r), log_q = logits[j] - std::log(sum_l);
      loss += std::exp(log_p) * (log_p - log_q);
    }
  }
  return {loss / static_cast<double>(rows)};
}

Doubles product_nt(const Doubles& a, const Doubles& w, size_t depth) {
  Doubles y;
  for (size_t i = 0; i < a.size() / depth; ++i) {
    for (size_t j = 0; j < w.size() / depth; ++j) {
      double sum = 0;
      for (size_t k = 0; k < depth; ++k) sum += a[i * depth + k] * w[j * depth + k];
      y.push_back(sum);
    }
  }
  return y;
}

// softmax - target: each is at most 1 and 1 / rows of the loss.
constexpr double kHeadFloor = 0.2;

TEST(CrossEntropy, OfLogitsAndOfTheHead) {
  const std::vector<int32_t> targets = {3, 0, 18, 3, 7};
  GradientCase c;
  c.jacobian_floor = kHeadFloor;
  c.shapes = {{1, 5, 19}};
  c.on_tape = [&](const std::vector<Var>& v) { return cross_entropy(v[0], targets); };
  c.reference = [&](const std::vector<Doubles>& x) {
    return cross_entropy_reference(x[0], targets);
  };
  check_gradients(c);
  c.shapes = {{1, 5, 4}, {1, 19, 4}};
  c.on_tape = [&](const std::vector<Var>& v) { return head_cross_entropy(v[0], v[1], targets); };
  c.reference = [&](const std::vector<Doubles>& x) {
    return cross_entropy_reference(product_nt(x[0], x[1], 4), targets);
  };
  c.roundings = 64;  // logits of 4 products up to 3, their error enters exp; sums of 19
  check_gradients(c);
}

TEST(Kl, OfLogitsAndOfTheHead) {
  const Floats reference = random_floats(5 * 19, 70);
  const Floats hidden = random_floats(5 * 4, 71), head = random_floats(19 * 4, 72);
  const Doubles hidden64(hidden.begin(), hidden.end()), head64(head.begin(), head.end());
  GradientCase c;
  c.jacobian_floor = kHeadFloor;
  c.shapes = {{1, 5, 19}};
  c.on_tape = [&](const std::vector<Var>& v) {
    return kl(v[0].tape().constant({1, 5, 19}, reference.data()), v[0]);
  };
  c.reference = [&](const std::vector<Doubles>& x) {
    return kl_reference(Doubles(reference.begin(), reference.end()), x[0], 5);
  };
  check_gradients(c);
  c.shapes = {{1, 5, 4}, {1, 19, 4}};
  c.on_tape = [&](const std::vector<Var>& v) {
    Tape& tape = v[0].tape();
    return head_kl(tape.constant({1, 5, 4}, hidden.data()), tape.constant({1, 19, 4}, head.data()),
                   v[0], v[1]);
  };
  c.reference = [&](const std::vector<Doubles>& x) {
    return kl_reference(product_nt(hidden64, head64, 4), product_nt(x[0], x[1], 4), 5);
  };
  c.roundings = 64;
  check_gradients(c);
}

TEST(Kl, IsExactlyZeroWithZeroGradientOfItself) {
  const Floats x = random_floats(300 * 4, 1), head = random_floats(19 * 4, 2);
  Floats gradient(300 * 4);
  Tape tape(kernels_for(best_isa()), 2);
  const Var hidden = tape.parameter({1, 300, 4}, x.data(), gradient.data());  // three blocks
  const Var w = tape.constant({1, 19, 4}, head.data());
  const Var loss = head_kl(detach(hidden), w, hidden, w);
  EXPECT_EQ(loss.item(), 0);
  tape.backward(loss);
  EXPECT_EQ(gradient, Floats(300 * 4));
}

TEST(Head, BlocksOfRowsGiveTheLossOfTheLogits) {
  const Floats x = random_floats(300 * 4, 1), w = random_floats(19 * 4, 2);
  std::vector<int32_t> targets;
  for (int32_t i = 0; i < 300; ++i) targets.push_back(i * 7 % 19);
  std::vector<Floats> dx(2, Floats(1200)), dw(2, Floats(76));
  float loss[2];
  for (size_t fused = 0; fused < 2; ++fused) {
    Tape tape(kernels_for(best_isa()), 2);
    const Var hidden = tape.parameter({1, 300, 4}, x.data(), dx[fused].data());
    const Var head = tape.parameter({1, 19, 4}, w.data(), dw[fused].data());
    const Var y = fused ? head_cross_entropy(hidden, head, targets)
                        : cross_entropy(matmul_nt(hidden, head), targets);
    loss[fused] = y.item();
    tape.backward(scale(y, 3.0f));
  }
  EXPECT_EQ(loss[0], loss[1]);
  // The sums over 300 rows are cut in other places: 300 roundings of terms up to 3 * 3 / 300.
  for (size_t i = 0; i < 1200; ++i) ASSERT_NEAR(dx[0][i], dx[1][i], 32 * 0x1.0p-24 * 0.03);
  for (size_t i = 0; i < 76; ++i) ASSERT_NEAR(dw[0][i], dw[1][i], 300 * 0x1.0p-24 * 3);
}

}  // namespace
}  // namespace tq
