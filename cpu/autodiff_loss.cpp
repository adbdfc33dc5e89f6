// autodiff_loss - sums over whole tensors and the inverse of small matrices. See autodiff_ops.h.
//
// Sums are taken row by row in f64 and then over the rows, so they do not depend on the threads.
#include <Eigen/LU>
#include <cmath>

#include "cpu/autodiff_node.h"
#include "cpu/autodiff_ops.h"

namespace tq {
namespace {

Tensor number(const Tape& tape, double value) {
  Tensor result = new_tensor(tape, {});
  *result.own() = static_cast<float>(value);
  return result;
}

}  // namespace

Var sum_squares(const Var& x) {
  const int64_t cols = x.shape().cols, n_rows = x.shape().batch * x.shape().rows;
  const double sum = ordered_sum(x.tape(), n_rows, cols, [&](int64_t row) {
    double squares = 0;
    for (int64_t j = row * cols; j < (row + 1) * cols; ++j) {
      squares += double{x.data()[j]} * double{x.data()[j]};
    }
    return squares;
  });
  const int32_t node = x.node();
  const Tensor kept = x.value();
  return new_var(number(x.tape(), sum), {&x}, [=](Tensor gradient, Gradients& out) {
    const float factor = 2.0f * *gradient.data();
    const GradientTarget to = out.target(node);
    parallel_ranges(out.tape(), kept.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float term = factor * kept.data()[i];
        to.data[i] = to.accumulate ? to.data[i] + term : term;
      }
    });
  });
}

// Targets whose root mean square is below this count as if it were this: the gradient, about its
// inverse, must stay inside f32.
constexpr double kSmallestTarget = 1e-24;

Var relative_error(const Var& y, const Var& target) {
  TQ_CHECK(y.shape() == target.shape() && !target.needs_gradient());
  const Shape shape = y.shape();
  double total = 0;
  // 1 / ||target||^2 of every entry; an entry whose target is 0 counts its plain error.
  std::vector<double> weights;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const float *from = y.data() + b * shape.matrix(), *to = target.data() + b * shape.matrix();
    const auto sum_rows = [&](const auto& term) {
      return ordered_sum(y.tape(), shape.rows, shape.cols, [&](int64_t row) {
        double sum = 0;
        for (int64_t j = row * shape.cols; j < (row + 1) * shape.cols; ++j) sum += term(j);
        return sum;
      });
    };
    const double size = sum_rows([&](int64_t j) { return double{to[j]} * double{to[j]}; });
    const double floor = kSmallestTarget * kSmallestTarget * static_cast<double>(shape.matrix());
    weights.push_back(size > 0 ? 1 / std::max(size, floor) : 1);
    total += weights.back() * sum_rows([&](int64_t j) {
               const double difference = double{from[j]} - double{to[j]};
               return difference * difference;
             });
  }
  const int32_t node = y.node();
  const Tensor kept = y.value(), kept_target = target.value();
  return new_var(number(y.tape(), total), {&y, &target}, [=](Tensor gradient, Gradients& out) {
    const GradientTarget to = out.target(node);
    for (int64_t b = 0; b < shape.batch; ++b) {
      const double wide = 2 * double{*gradient.data()} * weights[static_cast<size_t>(b)];
      const float factor = static_cast<float>(wide);
      // 1 / ||target||^2 of a small target is beyond f32 where the gradient is not.
      const bool narrow = std::fabs(wide) < 0x1p100;
      const int64_t at = b * shape.matrix();
      parallel_ranges(out.tape(), shape.matrix(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = at + begin; i < at + end; ++i) {
          const float difference = kept.data()[i] - kept_target.data()[i];
          const float term =
              narrow ? factor * difference : static_cast<float>(wide * double{difference});
          to.data[i] = to.accumulate ? to.data[i] + term : term;
        }
      });
    }
  });
}

namespace {

using RowMajor = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using FloatMap =
    Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;

RowMajor matrix_at(const Tensor& t, int64_t index) {
  const Shape& shape = t.shape();
  return FloatMap(t.data() + index * shape.matrix(), shape.rows, shape.cols).cast<double>();
}

}  // namespace

Var inverse(const Var& a) {
  const Shape shape = a.shape();
  TQ_CHECK(shape.rows == shape.cols);
  Tensor value = new_tensor(a.tape(), shape);
  std::vector<RowMajor> inverses(static_cast<size_t>(shape.batch));
  std::vector<char> singular(inverses.size());
  parallel_ranges(a.tape(), shape.batch, shape.matrix() * 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      RowMajor& result = inverses[static_cast<size_t>(i)];
      result = matrix_at(a.value(), i).partialPivLu().inverse();
      singular[static_cast<size_t>(i)] = !result.allFinite();
      for (int64_t j = 0; j < shape.matrix(); ++j) {
        value.own()[i * shape.matrix() + j] = static_cast<float>(result.data()[j]);
      }
    }
  });
  for (char bad : singular) {
    if (bad) {
      throw Error(ErrorKind::kBadData, "matrix has no inverse", "a factor that is learned",
                  "it is singular", "use a smaller step");
    }
  }
  const int32_t node = a.node();
  // d(A^-1) = -A^-1 dA A^-1, so dA = -A^-T G A^-T
  return new_var(
      std::move(value), {&a}, [=, inverses = std::move(inverses)](Tensor gradient, Gradients& out) {
        float* to = out.sum(node);
        for (int64_t i = 0; i < shape.batch; ++i) {
          const RowMajor& inverse = inverses[static_cast<size_t>(i)];
          const RowMajor da = inverse.transpose() * matrix_at(gradient, i) * inverse.transpose();
          for (int64_t j = 0; j < shape.matrix(); ++j) {
            to[i * shape.matrix() + j] -= static_cast<float>(da.data()[j]);
          }
        }
      });
}

}  // namespace tq
