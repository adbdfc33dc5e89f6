// autodiff_head - cross entropy and KL divergence of logits, and of hidden states times a head.
//
// A vocabulary has 49152 to 150000 entries: logits of 2048 rows are a gigabyte. The losses of a row
// turn its logits into their gradient in place; the head_ forms never hold more than kHeadRows rows
// of logits. See autodiff_model.h.
#include <cmath>
#include <cstring>

#include "cpu/autodiff_model.h"
#include "cpu/autodiff_node.h"

namespace tq {
namespace {

// Rows of logits at a time: adding to the gradient of a head costs as much memory traffic for few
// rows as for many.
constexpr int64_t kHeadRows = 128;

float largest(const float* x, int64_t count) {
  constexpr int64_t kChains = 8;  // one chain would wait four cycles for each comparison
  float max[kChains];
  std::fill_n(max, kChains, x[0]);
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    for (int64_t j = 0; j < kChains; ++j) max[j] = max[j] < x[i + j] ? x[i + j] : max[j];
  }
  for (; i < count; ++i) max[0] = max[0] < x[i] ? x[i] : max[0];
  return *std::max_element(max, max + kChains);
}

// x <- softmax(x); returns log sum exp(x).
double softmax_row(const Kernels& kernels, float* x, int64_t count) {
  constexpr int64_t kChunk = 256;  // short f32 chains, f64 across them
  const float max = largest(x, count);
  double sum = 0;
  for (int64_t i = 0; i < count; i += kChunk) {
    sum += static_cast<double>(kernels.exp_sum(x + i, max, std::min(kChunk, count - i)));
  }
  const float inverse = static_cast<float>(1 / sum);
  for (int64_t i = 0; i < count; ++i) x[i] *= inverse;
  return static_cast<double>(max) + std::log(sum);
}

// The loss of row `row`; its logits become the gradient. `scratch` has two rows.
using RowLoss = std::function<double(int64_t row, float* logits, float* scratch)>;

RowLoss cross_entropy_row(const Kernels& kernels, int64_t vocab, std::vector<int32_t> targets) {
  return [&kernels, vocab, targets = std::move(targets)](int64_t row, float* logits, float*) {
    const int32_t target = targets[static_cast<size_t>(row)];
    const double logit = static_cast<double>(logits[target]);
    const double log_sum = softmax_row(kernels, logits, vocab);
    logits[target] -= 1.0f;
    return log_sum - logit;
  };
}

// p log(p / q) summed, from the logits r of p and l of q: sum p (r - l) - lse(r) + lse(l).
double kl_row(const Kernels& kernels, const float* reference, float* logits, int64_t vocab,
              float* scratch) {
  float *p = scratch, *difference = scratch + vocab;
  for (int64_t i = 0; i < vocab; ++i) {
    p[i] = reference[i];
    difference[i] = reference[i] - logits[i];
  }
  const double log_sums = softmax_row(kernels, p, vocab) - softmax_row(kernels, logits, vocab);
  double sum = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    sum += static_cast<double>(p[i]) * static_cast<double>(difference[i]);
    logits[i] -= p[i];
  }
  return sum - log_sums;
}

Tensor number(const Tape& tape, double value) {
  Tensor result = new_tensor(tape, {});
  *result.own() = static_cast<float>(value);
  return result;
}

void multiply_all(const Tape& tape, float factor, Tensor& x) {
  parallel_ranges(tape, x.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) x.own()[i] *= factor;
  });
}

// Sum of the losses of `n_rows` rows of logits, from row `first` of the whole on; in place.
double sum_rows(const Tape& tape, const RowLoss& loss, int64_t first, int64_t n_rows, int64_t vocab,
                float* logits) {
  std::vector<double> losses(static_cast<size_t>(n_rows));
  parallel_ranges(tape, n_rows, 16 * vocab, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(2 * vocab));
    for (int64_t row = begin; row < end; ++row) {
      losses[static_cast<size_t>(row)] = loss(first + row, logits + row * vocab, scratch.data());
    }
  });
  double sum = 0;
  for (double value : losses) sum += value;
  return sum;
}

// Mean loss of logits that exist.
Var mean_loss(Var logits, RowLoss loss) {
  const Shape shape = logits.shape();
  const int64_t vocab = shape.cols, n_rows = shape.batch * shape.rows;
  const double sum = ordered_sum(logits.tape(), n_rows, 16 * vocab, [&](int64_t row) {
    std::vector<float> copy(logits.data() + row * vocab, logits.data() + (row + 1) * vocab);
    std::vector<float> scratch(static_cast<size_t>(2 * vocab));
    return loss(row, copy.data(), scratch.data());
  });
  Tensor value = number(logits.tape(), sum / static_cast<double>(n_rows));
  const int32_t node = logits.node();
  return new_var(
      std::move(value), {&logits},
      [=, kept = logits.value(), loss = std::move(loss)](Tensor gradient, Gradients& out) mutable {
        Tensor d = own_tensor(out.tape(), std::move(kept));
        sum_rows(out.tape(), loss, 0, n_rows, vocab, d.own());
        multiply_all(out.tape(), *gradient.data() / static_cast<float>(n_rows), d);
        out.add(node, std::move(d));
      });
}

// rows [first, first + count) of a w^T
void multiply_nt(const Tape& tape, const Tensor& a, const Tensor& w, int64_t first, int64_t count,
                 float* to) {
  const int64_t depth = a.shape().cols, cols = w.shape().rows;
  const GemmJob job = {a.data() + first * depth,
                       depth,
                       1,
                       w.data(),
                       1,
                       depth,
                       to,
                       cols,
                       count,
                       cols,
                       depth,
                       false,
                       nullptr};
  run_gemms(tape.kernels(), tape.n_threads(), {&job, 1});
}

// Mean loss of hidden head^T, with the gradients for a loss gradient of 1.
struct HeadLoss {
  double sum = 0;
  Tensor d_hidden, d_head;  // of the sum; only where wanted
};

// Called before the rows [first, first + count) are looked at.
using PrepareRows = std::function<void(int64_t first, int64_t count)>;

HeadLoss run_head(const Var& hidden, const Var& head, const PrepareRows& prepare,
                  const RowLoss& loss) {
  const Tape& tape = hidden.tape();
  const int64_t n_rows = hidden.shape().rows, dim = hidden.shape().cols, vocab = head.shape().rows;
  HeadLoss result;
  if (hidden.needs_gradient()) result.d_hidden = new_tensor(tape, hidden.shape());
  if (head.needs_gradient()) result.d_head = new_tensor(tape, head.shape());
  Tensor logits = new_tensor(tape, {1, std::min(kHeadRows, n_rows), vocab});
  for (int64_t first = 0; first < n_rows; first += kHeadRows) {
    const int64_t count = std::min(kHeadRows, n_rows - first);
    if (prepare) prepare(first, count);
    multiply_nt(tape, hidden.value(), head.value(), first, count, logits.own());
    result.sum += sum_rows(tape, loss, first, count, vocab, logits.own());
    const float* d_logits = logits.data();
    if (result.d_hidden.exists()) {
      const GemmJob job = {
          d_logits, vocab, 1,   head.data(), dim,   1,      result.d_hidden.own() + first * dim,
          dim,      count, dim, vocab,       false, nullptr};
      run_gemms(tape.kernels(), tape.n_threads(), {&job, 1});
    }
    if (result.d_head.exists()) {
      const GemmJob job = {d_logits,
                           1,
                           vocab,
                           hidden.data() + first * dim,
                           dim,
                           1,
                           result.d_head.own(),
                           dim,
                           vocab,
                           dim,
                           count,
                           first > 0,
                           nullptr};
      run_gemms(tape.kernels(), tape.n_threads(), {&job, 1});
    }
  }
  return result;
}

Var mean_head_loss(const Var& hidden, const Var& head, const PrepareRows& prepare,
                   const RowLoss& loss) {
  TQ_CHECK(hidden.shape().batch == 1 && head.shape().batch == 1 &&
           hidden.shape().cols == head.shape().cols);
  const int64_t n_rows = hidden.shape().rows;
  HeadLoss result = run_head(hidden, head, prepare, loss);
  Tensor value = number(hidden.tape(), result.sum / static_cast<double>(n_rows));
  const int32_t hidden_node = hidden.node(), head_node = head.node();
  return new_var(std::move(value), {&hidden, &head},
                 [=, d_hidden = std::move(result.d_hidden), d_head = std::move(result.d_head)](
                     Tensor gradient, Gradients& out) mutable {
                   const float factor = *gradient.data() / static_cast<float>(n_rows);
                   const auto pass = [&](int32_t node, Tensor d) {
                     if (node == kNoNode) return;
                     d = own_tensor(out.tape(), std::move(d));
                     multiply_all(out.tape(), factor, d);
                     out.add(node, std::move(d));
                   };
                   pass(hidden_node, std::move(d_hidden));
                   pass(head_node, std::move(d_head));
                 });
}

void check_targets(std::span<const int32_t> targets, int64_t n_rows, int64_t vocab) {
  TQ_CHECK(static_cast<int64_t>(targets.size()) == n_rows);
  for (int32_t target : targets) TQ_CHECK(target >= 0 && target < vocab);
}

}  // namespace

Var cross_entropy(Var logits, std::span<const int32_t> targets) {
  const Shape shape = logits.shape();
  check_targets(targets, shape.batch * shape.rows, shape.cols);
  const Kernels& kernels = logits.tape().kernels();
  return mean_loss(std::move(logits),
                   cross_entropy_row(kernels, shape.cols, {targets.begin(), targets.end()}));
}

Var kl(const Var& reference, Var logits) {
  TQ_CHECK(reference.shape() == logits.shape() && !reference.needs_gradient());
  const Kernels& kernels = logits.tape().kernels();
  const int64_t vocab = logits.shape().cols;
  return mean_loss(std::move(logits), [&kernels, vocab, kept = reference.value()](
                                          int64_t row, float* logits, float* scratch) {
    return kl_row(kernels, kept.data() + row * vocab, logits, vocab, scratch);
  });
}

Var head_cross_entropy(const Var& hidden, const Var& head, std::span<const int32_t> targets) {
  const int64_t vocab = head.shape().rows;
  check_targets(targets, hidden.shape().rows, vocab);
  return mean_head_loss(
      hidden, head, nullptr,
      cross_entropy_row(hidden.tape().kernels(), vocab, {targets.begin(), targets.end()}));
}

Var head_kl(const Var& reference_hidden, const Var& reference_head, const Var& hidden,
            const Var& head) {
  TQ_CHECK(!reference_hidden.needs_gradient() && !reference_head.needs_gradient() &&
           reference_hidden.shape().rows == hidden.shape().rows &&
           reference_head.shape().rows == head.shape().rows);
  const Tape& tape = hidden.tape();
  const int64_t vocab = head.shape().rows, n_rows = hidden.shape().rows;
  // Logits of the reference for the block of rows that run_head() works on.
  Tensor block = new_tensor(tape, {1, std::min(kHeadRows, n_rows), vocab});
  return mean_head_loss(
      hidden, head,
      [&](int64_t first, int64_t count) {
        multiply_nt(tape, reference_hidden.value(), reference_head.value(), first, count,
                    block.own());
      },
      [&](int64_t row, float* logits, float* scratch) {
        return kl_row(tape.kernels(), block.data() + row % kHeadRows * vocab, logits, vocab,
                      scratch);
      });
}

}  // namespace tq
