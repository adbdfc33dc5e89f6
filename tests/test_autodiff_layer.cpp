// A whole transformer layer with its head on the tape: gradients, and the memory it needs.
#include <gtest/gtest.h>

#include "cpu/autodiff_model.h"
#include "cpu/autodiff_rounding.h"
#include "tests/autodiff_cases.h"

namespace tq {
namespace {

struct Sizes {
  int64_t dim, hidden_dim, n_heads, n_kv_heads, head_dim, vocab, n_texts, length;
  int64_t rows() const { return n_texts * length; }
  int64_t q_dim() const { return n_heads * head_dim; }
  int64_t kv_dim() const { return n_kv_heads * head_dim; }
};

enum Input : size_t { kX, kQ, kWq, kWk, kWv, kWo, kGate, kUp, kDown, kHead, kGain, kNumInputs };

std::vector<Shape> input_shapes(const Sizes& s) {
  return {{1, s.rows(), s.dim},     {1, s.dim, s.dim},        {1, s.q_dim(), s.dim},
          {1, s.kv_dim(), s.dim},   {1, s.kv_dim(), s.dim},   {1, s.dim, s.q_dim()},
          {1, s.hidden_dim, s.dim}, {1, s.hidden_dim, s.dim}, {1, s.dim, s.hidden_dim},
          {1, s.vocab, s.dim},      {1, 1, s.head_dim}};
}

RopeTable rope_table(int64_t head_dim) {
  RopeTable table;
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    table.inv_freq.push_back(1.0f / static_cast<float>(1 + 2 * i));
  }
  return table;
}

Var identity(const Var& x) {
  return x;
}

// The layer of model/forward.cpp in the basis Q: inputs w Q, outputs Q^T w, q and k normed per
// head as Qwen3 does. `round` is applied to every weight and input of a linear.
Var layer_on_tape(const Sizes& s, const std::vector<Var>& in,
                  const std::function<Var(const Var&)>& round) {
  const RopeTable table = rope_table(s.head_dim);
  const auto reads = [&](Input w) { return round(fold_right(in[w], in[kQ])); };
  const auto writes = [&](Input w) { return round(fold_left(in[w], in[kQ])); };
  const auto head_norm = [&](const Var& x, int64_t n_heads) {
    const Var normed = rms_norm(reshape(x, {1, s.rows() * n_heads, s.head_dim}), 1e-3f);
    return reshape(mul_row(normed, in[kGain]), {1, s.rows(), n_heads * s.head_dim});
  };
  Var x = in[kX];
  {
    const Var x_norm = round(rms_norm(x, 1e-3f));
    const Var q = head_norm(matmul_nt(x_norm, reads(kWq)), s.n_heads);
    const Var k = head_norm(matmul_nt(x_norm, reads(kWk)), s.n_kv_heads);
    const Var v = matmul_nt(x_norm, reads(kWv));
    const Var attn_out = causal_attention(rope(q, table, s.n_heads, s.n_texts),
                                          rope(k, table, s.n_kv_heads, s.n_texts), v,
                                          {s.n_heads, s.n_kv_heads, s.n_texts});
    x = add(x, matmul_nt(round(attn_out), writes(kWo)));
  }
  const Var x_norm = round(rms_norm(x, 1e-3f));
  const Var gate = matmul_nt(x_norm, reads(kGate)), up = matmul_nt(x_norm, reads(kUp));
  return add(x, matmul_nt(round(silu_mul(gate, up)), writes(kDown)));
}

// The same in f64, as plainly as it can be said. Matrices are row-major with `cols` columns.
Doubles times(const Doubles& a, const Doubles& b, size_t cols_a, size_t cols_b, bool a_transposed,
              bool b_transposed) {
  const size_t rows_a = a.size() / cols_a, rows_b = b.size() / cols_b;
  const size_t rows = a_transposed ? cols_a : rows_a, depth = a_transposed ? rows_a : cols_a;
  const size_t cols = b_transposed ? rows_b : cols_b;
  Doubles y(rows * cols);
  for (size_t i = 0; i < rows; ++i) {
    for (size_t k = 0; k < depth; ++k) {
      for (size_t j = 0; j < cols; ++j) {
        y[i * cols + j] += a[a_transposed ? k * cols_a + i : i * cols_a + k] *
                           b[b_transposed ? j * cols_b + k : k * cols_b + j];
      }
    }
  }
  return y;
}

Doubles normed(Doubles x, size_t cols, const Doubles* gain) {
  for (size_t row = 0; row < x.size(); row += cols) {
    double squares = 0;
    for (size_t j = 0; j < cols; ++j) squares += x[row + j] * x[row + j];
    const double root = std::sqrt(squares / static_cast<double>(cols) + double{1e-3f});
    for (size_t j = 0; j < cols; ++j) x[row + j] *= (gain ? (*gain)[j] : 1) / root;
  }
  return x;
}

Doubles turned(Doubles x, size_t n_heads, size_t head_dim, size_t length) {
  const RopeTable table = rope_table(static_cast<int64_t>(head_dim));
  for (size_t i = 0; i < x.size() / head_dim; ++i) {
    for (size_t j = 0; j < head_dim / 2; ++j) {
      double &a = x[i * head_dim + j], &b = x[i * head_dim + j + head_dim / 2];
      const double angle = double{static_cast<float>(i / n_heads % length) * table.inv_freq[j]};
      const double turned_a = a * std::cos(angle) - b * std::sin(angle);
      b = b * std::cos(angle) + a * std::sin(angle);
      a = turned_a;
    }
  }
  return x;
}

Doubles attended(const Sizes& s, const Doubles& q, const Doubles& k, const Doubles& v) {
  const auto n = [](int64_t size) { return static_cast<size_t>(size); };
  Doubles out(q.size());
  for (size_t row = 0; row < n(s.rows()); ++row) {
    for (size_t head = 0; head < n(s.n_heads); ++head) {
      const double* query = &q[row * n(s.q_dim()) + head * n(s.head_dim)];
      const size_t kv = head / n(s.n_heads / s.n_kv_heads) * n(s.head_dim);
      const size_t first = row / n(s.length) * n(s.length);
      double sum = 0;
      Doubles p;
      for (size_t key = first; key <= row; ++key) {
        double score = 0;
        for (size_t i = 0; i < n(s.head_dim); ++i)
          score += query[i] * k[key * n(s.kv_dim()) + kv + i];
        p.push_back(std::exp(score / std::sqrt(static_cast<double>(s.head_dim))));
        sum += p.back();
      }
      for (size_t key = first; key <= row; ++key) {
        for (size_t i = 0; i < n(s.head_dim); ++i) {
          out[row * n(s.q_dim()) + head * n(s.head_dim) + i] +=
              p[key - first] / sum * v[key * n(s.kv_dim()) + kv + i];
        }
      }
    }
  }
  return out;
}

Doubles layer_reference(const Sizes& s, const std::vector<Doubles>& in) {
  const auto n = [](int64_t size) { return static_cast<size_t>(size); };
  const size_t dim = n(s.dim), hidden = n(s.hidden_dim), head_dim = n(s.head_dim);
  const auto reads = [&](const Doubles& x, Input w) {
    return times(x, times(in[w], in[kQ], dim, dim, false, false), dim, dim, false, true);
  };
  const auto writes = [&](const Doubles& x, Input w, size_t cols) {
    return times(x, times(in[kQ], in[w], dim, cols, true, false), cols, cols, false, true);
  };
  Doubles x = in[kX];
  const auto add_to_x = [&](const Doubles& y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  };
  const Doubles x_norm = normed(x, dim, nullptr);
  const Doubles q =
      turned(normed(reads(x_norm, kWq), head_dim, &in[kGain]), n(s.n_heads), head_dim, n(s.length));
  const Doubles k = turned(normed(reads(x_norm, kWk), head_dim, &in[kGain]), n(s.n_kv_heads),
                           head_dim, n(s.length));
  add_to_x(writes(attended(s, q, k, reads(x_norm, kWv)), kWo, n(s.q_dim())));
  const Doubles ffn_norm = normed(x, dim, nullptr);
  Doubles gate = reads(ffn_norm, kGate);
  const Doubles up = reads(ffn_norm, kUp);
  for (size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
  add_to_x(writes(gate, kDown, hidden));
  return x;
}

double kl_reference(const Doubles& reference, const Doubles& logits, size_t vocab) {
  double loss = 0;
  for (size_t at = 0; at < logits.size(); at += vocab) {
    double sum_r = 0, sum_l = 0;
    for (size_t j = at; j < at + vocab; ++j) {
      sum_r += std::exp(reference[j]);
      sum_l += std::exp(logits[j]);
    }
    for (size_t j = at; j < at + vocab; ++j) {
      const double log_p = reference[j] - std::log(sum_r);
      loss += std::exp(log_p) * (log_p - logits[j] + std::log(sum_l));
    }
  }
  return loss / static_cast<double>(logits.size() / vocab);
}

TEST(Layer, GradientsOfEveryWeightThroughTheKlHead) {
  const Sizes s = {8, 10, 4, 2, 4, 11, 2, 3};
  const Floats reference_hidden = random_floats(s.rows() * s.dim, 80);
  const Floats reference_head = random_floats(s.vocab * s.dim, 81, 0.5f);
  const Doubles reference =
      times(Doubles(reference_hidden.begin(), reference_hidden.end()),
            Doubles(reference_head.begin(), reference_head.end()), 8, 8, false, true);
  GradientCase c;
  c.shapes = input_shapes(s);
  c.prepare = [](size_t input, float v) {
    return input == kX ? v : input == kGain ? 1.0f + 0.1f * v : 0.4f * v;
  };
  c.on_tape = [&](const std::vector<Var>& in) {
    Tape& tape = in[0].tape();
    return head_kl(tape.constant({1, s.rows(), s.dim}, reference_hidden.data()),
                   tape.constant({1, s.vocab, s.dim}, reference_head.data()),
                   rms_norm(layer_on_tape(s, in, identity), 1e-3f), in[kHead]);
  };
  c.reference = [&](const std::vector<Doubles>& in) {
    const Doubles logits =
        times(normed(layer_reference(s, in), 8, nullptr), in[kHead], 8, 8, false, true);
    return Doubles{kl_reference(reference, logits, 11)};
  };
  // About 20 operations deep, each with some 10 roundings; gradients that cancel do so from the
  // size of the largest ones, about 0.1.
  c.roundings = 200;
  c.jacobian_floor = 0.1;
  check_gradients(c);
}

struct Measured {
  std::vector<Floats> gradients;
  int64_t peak_bytes = 0;
};

// Two layers with rounding; weights are constants, Q and x parameters.
Measured run_two_layers(const Sizes& s, bool with_checkpoints) {
  const std::vector<Shape> shapes = input_shapes(s);
  std::vector<Floats> in;
  for (size_t i = 0; i < kNumInputs; ++i) in.push_back(random_floats(shapes[i].size(), 90, 0.2f));
  const Floats target = random_floats(shapes[kX].size(), 91);
  Measured result;
  result.gradients = {Floats(in[kX].size()), Floats(in[kQ].size())};
  Tape tape(kernels_for(best_isa()), 2);
  Var x = tape.parameter(shapes[kX], in[kX].data(), result.gradients[0].data());
  for (int layer = 0; layer < 2; ++layer) {
    const CheckpointBody body = [&](Tape& t, const std::vector<Var>& inputs) {
      std::vector<Var> v = inputs;
      v.push_back(t.parameter(shapes[kQ], in[kQ].data(), result.gradients[1].data()));
      for (size_t i = kWq; i < kNumInputs; ++i) v.push_back(t.constant(shapes[i], in[i].data()));
      return layer_on_tape(s, v, [](const Var& w) { return round_groups(w, {4, 16}); });
    };
    x = with_checkpoints ? checkpoint(tape, body, {x}) : body(tape, {x});
  }
  tape.backward(relative_error(x, tape.constant(shapes[kX], target.data())));
  result.peak_bytes = tape.peak_bytes();
  return result;
}

TEST(Layer, CheckpointsLowerThePeakAndKeepTheGradients) {
  const Sizes s = {64, 224, 4, 2, 16, 0, 2, 64};
  const Measured plain = run_two_layers(s, false), saving = run_two_layers(s, true);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_TRUE(same_numbers(plain.gradients[i], saving.gradients[i]));
    EXPECT_NE(saving.gradients[i], Floats(saving.gradients[i].size()));
  }
  EXPECT_LT(saving.peak_bytes, plain.peak_bytes * 2 / 3);
}

TEST(Layer, OneOfAnEightBillionModelNeedsLessThanFourGigabytes) {
  // dim 4096, hidden 14336, 32 heads on 8 key heads, 4 texts of 512 tokens, every size but the
  // number of heads divided by 32: each tensor is then 1024 times smaller, Q (dim^2), weights and
  // activations (rows * dim) alike. 218 M weights are there twice, rotated and rounded: 1.75 GB;
  // three tensors of rows * hidden_dim, their gradients and eight of rows * dim: 1 GB. The caller's
  // weights (0.9 GB) and the scores of attention (64 queries a thread) are not counted.
  const Sizes s = {128, 448, 32, 8, 4, 0, 4, 16};
  EXPECT_LT(static_cast<double>(run_two_layers(s, true).peak_bytes) * 1024, 3.5e9);
}

}  // namespace
}  // namespace tq
