// autodiff_ops - elementwise operations, norms, transforms and sums. See autodiff_ops.h.
//
// Plain loops: the products take the time. Each function computes its value first, and below it,
// in the lambda, the gradient.
#include "cpu/autodiff_ops.h"

#include <cmath>
#include <cstring>

#include "cpu/autodiff_node.h"
#include "cpu/ops.h"

namespace tq {
namespace {

// Offset of element i of a batch of n in an operand that may have batch 1.
struct Broadcast {
  int64_t matrix;  // elements of one entry of the batch
  bool repeats;
  Broadcast(const Shape& operand, const Shape& full)
      : matrix(operand.matrix()), repeats(operand.batch == 1 && full.batch > 1) {
    TQ_CHECK(operand.batch == full.batch || operand.batch == 1, "batches do not fit");
  }
  int64_t offset(int64_t i) const { return repeats ? i % matrix : i; }
};

Shape joint_shape(const Shape& a, const Shape& b) {
  TQ_CHECK(a.rows == b.rows && a.cols == b.cols, "shapes do not fit");
  return {std::max(a.batch, b.batch), a.rows, a.cols};
}

// fn(i) for every element.
template <typename Function>
void for_elements(const Tape& tape, int64_t count, const Function& fn) {
  parallel_ranges(tape, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) fn(i);
  });
}

// Adds term(i) over all i of `full` to the gradient of an operand: element by element, or over the
// batch in ascending order where the operand serves all of it.
template <typename Function>
void add_elements(int32_t node, const Broadcast& from, const Shape& full, Gradients& out,
                  const Function& term) {
  const GradientTarget to = out.target(node);
  const int64_t n_repeats = from.repeats ? full.batch : 1, count = full.size() / n_repeats;
  for_elements(out.tape(), count, [&](int64_t i) {
    float sum = to.accumulate ? to.data[i] : 0.0f;
    for (int64_t b = 0; b < n_repeats; ++b) sum += term(b * count + i);
    to.data[i] = sum;
  });
}

// a + factor b
Var add_scaled(const Var& a, const Var& b, float factor) {
  const Shape shape = joint_shape(a.shape(), b.shape());
  const Broadcast from_a(a.shape(), shape), from_b(b.shape(), shape);
  Tensor value = new_tensor(a.tape(), shape);
  const float *x = a.data(), *y = b.data();
  float* to = value.own();
  for_elements(a.tape(), shape.size(),
               [&](int64_t i) { to[i] = x[from_a.offset(i)] + factor * y[from_b.offset(i)]; });
  const int32_t a_node = a.node(), b_node = b.node();
  return new_var(std::move(value), {&a, &b}, [=](Tensor gradient, Gradients& out) {
    const float* g = gradient.data();
    if (b_node != kNoNode) {
      add_elements(b_node, from_b, shape, out, [&](int64_t i) { return factor * g[i]; });
    }
    if (a_node == kNoNode) return;
    if (from_a.repeats) {
      add_elements(a_node, from_a, shape, out, [&](int64_t i) { return g[i]; });
    } else {
      out.add(a_node, std::move(gradient));
    }
  });
}

}  // namespace

Var add(const Var& a, const Var& b) {
  return add_scaled(a, b, 1.0f);
}
Var sub(const Var& a, const Var& b) {
  return add_scaled(a, b, -1.0f);
}

Var mul(const Var& a, const Var& b) {
  const Shape shape = joint_shape(a.shape(), b.shape());
  const Broadcast from_a(a.shape(), shape), from_b(b.shape(), shape);
  Tensor value = new_tensor(a.tape(), shape);
  float* to = value.own();
  for_elements(a.tape(), shape.size(),
               [&](int64_t i) { to[i] = a.data()[from_a.offset(i)] * b.data()[from_b.offset(i)]; });
  const int32_t a_node = a.node(), b_node = b.node();
  const Tensor kept_a = b.needs_gradient() ? a.value() : Tensor();
  const Tensor kept_b = a.needs_gradient() ? b.value() : Tensor();
  return new_var(std::move(value), {&a, &b}, [=](Tensor gradient, Gradients& out) {
    const float *g = gradient.data(), *x = kept_a.data(), *y = kept_b.data();
    if (a_node != kNoNode) {
      add_elements(a_node, from_a, shape, out,
                   [&](int64_t i) { return g[i] * y[from_b.offset(i)]; });
    }
    if (b_node != kNoNode) {
      add_elements(b_node, from_b, shape, out,
                   [&](int64_t i) { return g[i] * x[from_a.offset(i)]; });
    }
  });
}

Var scale(const Var& x, float factor) {
  Tensor value = new_tensor(x.tape(), x.shape());
  float* to = value.own();
  for_elements(x.tape(), x.shape().size(), [&](int64_t i) { to[i] = factor * x.data()[i]; });
  const int32_t node = x.node();
  return new_var(std::move(value), {&x}, [=](Tensor gradient, Gradients& out) {
    Tensor scaled = own_tensor(out.tape(), std::move(gradient));
    float* g = scaled.own();
    for_elements(out.tape(), scaled.size(), [&](int64_t i) { g[i] *= factor; });
    out.add(node, std::move(scaled));
  });
}

Var reshape(const Var& x, Shape shape) {
  const int32_t node = x.node();
  return new_var(x.value().reshaped(shape), {&x},
                 [=](Tensor gradient, Gradients& out) { out.add(node, std::move(gradient)); });
}

namespace {

// Adds the sum over rows of term(element) to a row vector's gradient, one column after the other
// in ascending rows (f64), for every entry of the batch.
template <typename Function>
void add_row_sums(int32_t node, const Shape& row, const Shape& full, Gradients& out,
                  const Function& term) {
  const GradientTarget to = out.target(node);
  const int64_t n_rows = row.batch == 1 ? full.batch * full.rows : full.rows;
  parallel_ranges(out.tape(), row.size(), n_rows, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(static_cast<size_t>(end - begin));
    for (int64_t at = begin; at < end;) {
      const int64_t entry = at / row.cols, first = at % row.cols;
      const int64_t last = std::min(row.cols, first + end - at);
      double* sum = sums.data() + (at - begin) - first;
      for (int64_t i = 0; i < n_rows; ++i) {
        for (int64_t j = first; j < last; ++j) {
          sum[j] += static_cast<double>(term((entry * n_rows + i) * row.cols + j));
        }
      }
      at += last - first;
    }
    for (int64_t at = begin; at < end; ++at) {
      const float sum = static_cast<float>(sums[static_cast<size_t>(at - begin)]);
      to.data[at] = to.accumulate ? to.data[at] + sum : sum;
    }
  });
}

// Where the row vectors of x lie.
struct RowOf {
  int64_t cols, n_rows, rows_each;  // n_rows of x in all, rows_each with the same vector
  RowOf(const Shape& row, const Shape& x)
      : cols(x.cols),
        n_rows(x.batch * x.rows),
        rows_each(row.batch == 1 ? x.batch * x.rows : x.rows) {
    TQ_CHECK(row.rows == 1 && row.cols == x.cols && (row.batch == x.batch || row.batch == 1),
             "shapes do not fit");
  }
};

// fn(i, j) for every element i of x and its element j of the row vectors.
template <typename Function>
void for_rows(const Tape& tape, const RowOf& at, const Function& fn) {
  parallel_ranges(tape, at.n_rows, at.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / at.rows_each * at.cols;
      for (int64_t j = 0; j < at.cols; ++j) fn(i * at.cols + j, row + j);
    }
  });
}

}  // namespace

Var add_row(const Var& x, const Var& row) {
  const Shape shape = x.shape(), row_shape = row.shape();
  const RowOf at(row_shape, shape);
  Tensor value = new_tensor(x.tape(), shape);
  float* to = value.own();
  const float *from = x.data(), *vector = row.data();
  for_rows(x.tape(), at, [&](int64_t i, int64_t j) { to[i] = from[i] + vector[j]; });
  const int32_t x_node = x.node(), row_node = row.node();
  return new_var(std::move(value), {&x, &row}, [=](Tensor gradient, Gradients& out) {
    const float* g = gradient.data();
    if (row_node != kNoNode) {
      add_row_sums(row_node, row_shape, shape, out, [&](int64_t i) { return g[i]; });
    }
    if (x_node != kNoNode) out.add(x_node, std::move(gradient));
  });
}

Var mul_row(const Var& x, const Var& row) {
  const Shape shape = x.shape(), row_shape = row.shape();
  const RowOf at(row_shape, shape);
  Tensor value = new_tensor(x.tape(), shape);
  float* to = value.own();
  const float *from = x.data(), *vector = row.data();
  for_rows(x.tape(), at, [&](int64_t i, int64_t j) { to[i] = from[i] * vector[j]; });
  const int32_t x_node = x.node(), row_node = row.node();
  const Tensor kept_x = row.needs_gradient() ? x.value() : Tensor();
  const Tensor kept_row = x.needs_gradient() ? row.value() : Tensor();
  return new_var(std::move(value), {&x, &row}, [=](Tensor gradient, Gradients& out) {
    const float* g = gradient.data();
    if (row_node != kNoNode) {
      add_row_sums(row_node, row_shape, shape, out,
                   [&](int64_t i) { return g[i] * kept_x.data()[i]; });
    }
    if (x_node == kNoNode) return;
    Tensor dx = own_tensor(out.tape(), std::move(gradient));
    float* to = dx.own();
    const float* vector = kept_row.data();
    for_rows(out.tape(), at, [&](int64_t i, int64_t j) { to[i] *= vector[j]; });
    out.add(x_node, std::move(dx));
  });
}

Var rms_norm(const Var& x, float eps) {
  const Shape shape = x.shape();
  const int64_t cols = shape.cols, n_rows = shape.batch * shape.rows;
  Tensor value = new_tensor(x.tape(), shape), inverse = new_tensor(x.tape(), {1, n_rows, 1});
  float *y = value.own(), *factors = inverse.own();
  parallel_ranges(x.tape(), n_rows, cols, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      factors[row] = inverse_rms(x.data() + row * cols, cols, eps);
      for (int64_t j = row * cols; j < (row + 1) * cols; ++j) y[j] = x.data()[j] * factors[row];
    }
  });
  const int32_t node = x.node();
  const Tensor kept = x.value();
  // y = s x with ds/dx = -s^3 x / cols: dx = s g - s^3 (g . x / cols) x
  return new_var(std::move(value), {&x}, [=](Tensor gradient, Gradients& out) {
    Tensor dx = own_tensor(out.tape(), std::move(gradient));
    parallel_ranges(out.tape(), n_rows, 2 * cols, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        float* g = dx.own() + row * cols;
        const float* from = kept.data() + row * cols;
        double dot = 0;
        for (int64_t j = 0; j < cols; ++j) dot += double{g[j]} * double{from[j]};
        const double s = inverse.data()[row];
        const float along = static_cast<float>(s * s * s * dot / static_cast<double>(cols));
        for (int64_t j = 0; j < cols; ++j) g[j] = inverse.data()[row] * g[j] - along * from[j];
      }
    });
    out.add(node, std::move(dx));
  });
}

Var silu_mul(const Var& gate, const Var& up) {
  TQ_CHECK(gate.shape() == up.shape());
  const int64_t count = gate.shape().size();
  Tensor value = new_tensor(gate.tape(), gate.shape());
  parallel_ranges(gate.tape(), count, 8, [&](int64_t begin, int64_t end) {
    std::copy(gate.data() + begin, gate.data() + end, value.own() + begin);
    gate.tape().kernels().silu_mul(value.own() + begin, up.data() + begin, end - begin);
  });
  const int32_t gate_node = gate.node(), up_node = up.node();
  const Tensor g = gate.value(), u = up.value();
  // silu = x s with s = 1 / (1 + exp(-x)); its slope is s (1 + x (1 - s)).
  return new_var(std::move(value), {&gate, &up}, [=](Tensor gradient, Gradients& out) {
    Tensor d_gate = own_tensor(out.tape(), std::move(gradient));
    Tensor d_up = new_tensor(out.tape(), d_gate.shape());
    constexpr int64_t kBlock = 256;
    parallel_ranges(
        out.tape(), (count + kBlock - 1) / kBlock, 16 * kBlock, [&](int64_t begin, int64_t end) {
          float e[kBlock];
          for (int64_t i = begin * kBlock; i < std::min(end * kBlock, count); i += kBlock) {
            const int64_t n = std::min(kBlock, count - i);
            for (int64_t j = 0; j < n; ++j) e[j] = -g.data()[i + j];
            out.tape().kernels().exp_sum(e, 0.0f, n);
            for (int64_t j = 0; j < n; ++j) {
              const float x = g.data()[i + j], s = 1.0f / (1.0f + e[j]);
              const float dy = d_gate.data()[i + j];
              d_up.own()[i + j] = dy * x * s;
              d_gate.own()[i + j] = dy * u.data()[i + j] * s * (1.0f + x * (1.0f - s));
            }
          }
        });
    if (up_node != kNoNode) out.add(up_node, std::move(d_up));
    if (gate_node != kNoNode) out.add(gate_node, std::move(d_gate));
  });
}

Var softmax(const Var& x) {
  const int64_t cols = x.shape().cols, n_rows = x.shape().batch * x.shape().rows;
  Tensor value = new_tensor(x.tape(), x.shape());
  parallel_ranges(x.tape(), n_rows, 8 * cols, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* y = value.own() + row * cols;
      std::copy_n(x.data() + row * cols, cols, y);
      const float sum = x.tape().kernels().exp_sum(y, *std::max_element(y, y + cols), cols);
      for (int64_t j = 0; j < cols; ++j) y[j] /= sum;
    }
  });
  const int32_t node = x.node();
  const Tensor kept = value;
  // dx = y (g - g . y)
  return new_var(std::move(value), {&x}, [=](Tensor gradient, Gradients& out) {
    Tensor dx = own_tensor(out.tape(), std::move(gradient));
    parallel_ranges(out.tape(), n_rows, 2 * cols, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        float* g = dx.own() + row * cols;
        const float* y = kept.data() + row * cols;
        double dot = 0;
        for (int64_t j = 0; j < cols; ++j) dot += double{g[j]} * double{y[j]};
        for (int64_t j = 0; j < cols; ++j) g[j] = y[j] * (g[j] - static_cast<float>(dot));
      }
    });
    out.add(node, std::move(dx));
  });
}

Var hadamard(const Var& x, const FastTransform& transform, bool inverse) {
  const int64_t cols = x.shape().cols, n_rows = x.shape().batch * x.shape().rows;
  TQ_CHECK(transform.size() == cols);
  Tensor value = new_tensor(x.tape(), x.shape());
  std::memcpy(value.own(), x.data(), static_cast<size_t>(value.size()) * sizeof(float));
  const auto apply = [n_rows, cols, &transform](const Tape& tape, bool back, float* rows) {
    parallel_ranges(tape, n_rows, 16 * cols, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        transform.apply_row(tape.kernels(), rows + i * cols, back);
      }
    });
  };
  apply(x.tape(), inverse, value.own());
  const int32_t node = x.node();
  return new_var(std::move(value), {&x}, [=](Tensor gradient, Gradients& out) {
    Tensor dx = own_tensor(out.tape(), std::move(gradient));
    apply(out.tape(), !inverse, dx.own());  // orthogonal: the transpose is the inverse
    out.add(node, std::move(dx));
  });
}

}  // namespace tq
