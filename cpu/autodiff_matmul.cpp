// autodiff_matmul - products of matrices and their gradients. See autodiff_ops.h.
//
// With C = A B: dA = dC B^T, dB = A^T dC. The kernel reads through strides (gemm.h), so a transpose
// is two numbers changed places, and the blocks of fold_right and fold_left are views.
#include <vector>

#include "cpu/autodiff_node.h"
#include "cpu/autodiff_ops.h"

namespace tq {
namespace {

// A stack of matrices in memory; `step` is 0 where one matrix serves the whole stack.
struct View {
  float* data;
  int64_t batch, step, rows, cols, row_stride, col_stride;
  View transposed() const { return {data, batch, step, cols, rows, col_stride, row_stride}; }
  bool shared() const { return step == 0 && batch > 1; }
};

// Views of constants are only read.
View view(const Shape& shape, const float* data, int64_t batch) {
  TQ_CHECK(shape.batch == batch || shape.batch == 1, "batches do not fit");
  return {const_cast<float*>(data),
          batch,
          shape.batch == 1 ? 0 : shape.matrix(),
          shape.rows,
          shape.cols,
          shape.cols,
          1};
}

// c (+)= a b, one product of the stack.
GemmJob job_of(const View& a, const View& b, const View& c, int64_t index, bool accumulate) {
  // c's columns are contiguous in the kernel: otherwise compute c^T = b^T a^T.
  if (c.col_stride != 1) {
    return job_of(b.transposed(), a.transposed(), c.transposed(), index, accumulate);
  }
  TQ_CHECK(a.cols == b.rows && c.rows == a.rows && c.cols == b.cols, "shapes do not fit");
  GemmJob job = {};
  job.a = a.data + index * a.step;
  job.a_row = a.row_stride;
  job.a_depth = a.col_stride;
  job.b = b.data + index * b.step;
  job.b_depth = b.row_stride;
  job.b_col = b.col_stride;
  job.c = c.data + index * c.step;
  job.c_row = c.row_stride;
  job.rows = a.rows;
  job.cols = b.cols;
  job.depth = a.cols;
  job.accumulate = accumulate;
  return job;
}

// c (+)= a b for the whole stack; where c is shared, the sum over the stack in ascending order.
void multiply(const Tape& tape, const View& a, const View& b, const View& c, bool accumulate) {
  std::vector<GemmJob> jobs;
  for (int64_t i = 0; i < c.batch; ++i) {
    jobs.push_back(job_of(a, b, c, i, accumulate || (c.shared() && i > 0)));
  }
  if (!c.shared()) {
    run_gemms(tape.kernels(), tape.n_threads(), jobs);
    return;
  }
  for (const GemmJob& job : jobs) run_gemms(tape.kernels(), tape.n_threads(), {&job, 1});
}

// The four sizes of a product of Vars, as they lie in memory, and which are read transposed.
struct Product {
  Shape a, b, c;
  bool a_transposed, b_transposed;

  View a_view(const float* data) const {
    const View v = view(a, data, c.batch);
    return a_transposed ? v.transposed() : v;
  }
  View b_view(const float* data) const {
    const View v = view(b, data, c.batch);
    return b_transposed ? v.transposed() : v;
  }
  View c_view(const float* data) const { return view(c, data, c.batch); }
};

Var multiply_vars(const Var& a, const Var& b, bool a_transposed, bool b_transposed) {
  Product product = {a.shape(), b.shape(), {}, a_transposed, b_transposed};
  // One b for a stack of a: all their rows are one matrix.
  if (product.b.batch == 1 && !a_transposed) {
    product.a = {1, product.a.batch * product.a.rows, product.a.cols};
  }
  product.c = {std::max(product.a.batch, product.b.batch),
               a_transposed ? product.a.cols : product.a.rows,
               b_transposed ? product.b.rows : product.b.cols};
  const Shape shape = {std::max(a.shape().batch, b.shape().batch),
                       a_transposed ? a.shape().cols : a.shape().rows, product.c.cols};
  Tensor value = new_tensor(a.tape(), product.c);
  multiply(a.tape(), product.a_view(a.data()), product.b_view(b.data()),
           product.c_view(value.data()), false);

  const int32_t a_node = a.node(), b_node = b.node();
  // Each gradient needs the other operand's value only.
  const Tensor kept_a = b.needs_gradient() ? a.value() : Tensor();
  const Tensor kept_b = a.needs_gradient() ? b.value() : Tensor();
  return new_var(value.reshaped(shape), {&a, &b}, [=](Tensor gradient, Gradients& out) {
    const View dc = product.c_view(gradient.data());
    if (a_node != kNoNode) {
      const GradientTarget to = out.target(a_node);
      multiply(out.tape(), dc, product.b_view(kept_b.data()).transposed(), product.a_view(to.data),
               to.accumulate);
    }
    if (b_node != kNoNode) {
      const GradientTarget to = out.target(b_node);
      multiply(out.tape(), product.a_view(kept_a.data()).transposed(), dc, product.b_view(to.data),
               to.accumulate);
    }
  });
}

// Blocks of columns (of rows) of a matrix as a stack: [rows, n * m] -> n of [rows, m].
View column_blocks(const Shape& shape, const float* data, int64_t m) {
  return {const_cast<float*>(data), shape.cols / m, m, shape.rows, m, shape.cols, 1};
}
View row_blocks(const Shape& shape, const float* data, int64_t m) {
  return {const_cast<float*>(data), shape.rows / m, m * shape.cols, m, shape.cols, shape.cols, 1};
}

// One entry of a batch.
const float* at(const Shape& shape, const float* data, int64_t index) {
  return data + (shape.batch == 1 ? 0 : index * shape.matrix());
}

}  // namespace

Var matmul_nt(const Var& x, const Var& w) {
  return multiply_vars(x, w, false, true);
}
Var matmul_nn(const Var& a, const Var& b) {
  return multiply_vars(a, b, false, false);
}
Var matmul_tn(const Var& a, const Var& b) {
  return multiply_vars(a, b, true, false);
}

namespace {

// y block = w block q (right) or q^T w block (left), for the blocks of every matrix of the batch.
struct Fold {
  Shape w, q, y;
  bool right;
  View blocks(const Shape& shape, const float* data, int64_t index) const {
    const float* matrix = at(shape, data, index);
    return right ? column_blocks(shape, matrix, q.rows) : row_blocks(shape, matrix, q.rows);
  }
  View q_view(const float* data, int64_t index) const {
    const int64_t n_blocks = (right ? w.cols : w.rows) / q.rows;
    return {const_cast<float*>(at(q, data, index)), n_blocks, 0, q.rows, q.rows, q.rows, 1};
  }
};

Var fold(const Var& w, const Var& q, bool right) {
  const Shape ws = w.shape(), qs = q.shape();
  TQ_CHECK(qs.rows == qs.cols && (right ? ws.cols : ws.rows) % qs.rows == 0);
  TQ_CHECK(ws.batch == qs.batch || ws.batch == 1 || qs.batch == 1, "batches do not fit");
  const Fold f = {ws, qs, {std::max(ws.batch, qs.batch), ws.rows, ws.cols}, right};
  Tensor value = new_tensor(w.tape(), f.y);
  const auto apply = [](const Tape& tape, const Fold& f, const float* w, const float* q, float* y,
                        int64_t i) {
    const View blocks = f.blocks(f.w, w, i), turn = f.q_view(q, i), out = f.blocks(f.y, y, i);
    if (f.right) {
      multiply(tape, blocks, turn, out, false);
    } else {
      multiply(tape, turn.transposed(), blocks, out, false);
    }
  };
  for (int64_t i = 0; i < f.y.batch; ++i) {
    apply(w.tape(), f, w.data(), q.data(), value.own(), i);
  }
  const int32_t w_node = w.node(), q_node = q.node();
  const Tensor kept_w = q.needs_gradient() ? w.value() : Tensor();
  const Tensor kept_q = w.needs_gradient() ? q.value() : Tensor();
  return new_var(std::move(value), {&w, &q}, [=](Tensor gradient, Gradients& out) {
    if (w_node != kNoNode) {
      const GradientTarget to = out.target(w_node);
      for (int64_t i = 0; i < f.y.batch; ++i) {
        const View dy = f.blocks(f.y, gradient.data(), i), turn = f.q_view(kept_q.data(), i);
        const View dw = f.blocks(f.w, to.data, i);
        const bool add = to.accumulate || (f.w.batch == 1 && i > 0);
        if (f.right) {
          multiply(out.tape(), dy, turn.transposed(), dw, add);
        } else {
          multiply(out.tape(), turn, dy, dw, add);
        }
      }
    }
    if (q_node != kNoNode) {
      const GradientTarget to = out.target(q_node);
      for (int64_t i = 0; i < f.y.batch; ++i) {
        const View dy = f.blocks(f.y, gradient.data(), i), blocks = f.blocks(f.w, kept_w.data(), i);
        const View dq = f.q_view(to.data, i);
        const bool add = to.accumulate || (f.q.batch == 1 && i > 0);
        if (f.right) {
          multiply(out.tape(), blocks.transposed(), dy, dq, add);
        } else {
          multiply(out.tape(), blocks, dy.transposed(), dq, add);
        }
      }
    }
  });
}

}  // namespace

Var fold_right(const Var& w, const Var& q) {
  return fold(w, q, true);
}
Var fold_left(const Var& w, const Var& q) {
  return fold(w, q, false);
}

}  // namespace tq
