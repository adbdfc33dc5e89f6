// hadamard - see hadamard.h.
//
// Shapes    v [m, 2^k] f32, one block
// Work      k butterfly stages (strides 1, 2, 4, ...), then the m x m stage along the other axis
// Memory    the block stays in the first-level cache (block 14336: 57 KB, second level)
// Requires  block = m * 2^k as model/hadamard.h builds it
// Error     (k + m) * 2^-24 relative to the norm of the block: every output passes k + m - 1
//           additions and one multiplication (tests/test_cpu_hadamard.cpp)
// Source    Kronecker factorisation; every element takes the same additions in the same order
//           whatever the vector width, so all instruction sets agree bit by bit
#include "cpu/hadamard.h"

#include <cmath>

#include "model/error.h"
#include "model/hadamard.h"

namespace tq {

FastTransform::FastTransform(const Transform& transform) : transform_(transform) {
  if (!transform.active()) return;
  TQ_CHECK(transform.kind == Transform::Kind::kHadamard, "a dense transform is a matrix product");
  TQ_CHECK(transform.block > 0 && transform.size % transform.block == 0);
  base_order_ = hadamard_base_order(transform.block);
  TQ_CHECK(base_order_ > 0, "no Hadamard matrix of this order");
  const std::vector<int8_t> base =
      base_order_ == 1 ? std::vector<int8_t>{1} : hadamard_base(base_order_);
  const int64_t m = base_order_;
  base_.resize(static_cast<size_t>(m * m));
  base_transposed_.resize(base_.size());
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t col = 0; col < m; ++col) {
      base_[static_cast<size_t>(row * m + col)] = base[static_cast<size_t>(row * m + col)];
      base_transposed_[static_cast<size_t>(col * m + row)] =
          base[static_cast<size_t>(row * m + col)];
    }
  }
  scale_ = static_cast<float>(1.0 / std::sqrt(static_cast<double>(transform.block)));
}

bool FastTransform::same_as(const FastTransform& other) const {
  const Transform &a = transform_, &b = other.transform_;
  if (a.kind != b.kind) return false;
  return !a.active() || (a.size == b.size && a.block == b.block && a.signs == b.signs);
}

void FastTransform::apply_block(const Kernels& kernels, const float* x, int64_t block_index,
                                bool inverse, float* scratch, float* out) const {
  const int64_t first = block_index * transform_.block, count = transform_.block;
  const int8_t* signs = transform_.signs ? transform_.signs + first : nullptr;
  x += first;
  out += first;
  for (int64_t i = 0; i < count; ++i) {
    scratch[i] = signs && !inverse && signs[i] < 0 ? -x[i] : x[i];
  }
  const int64_t inner = count / base_order_;
  for (int64_t a = 0; a < base_order_; ++a) kernels.butterflies(scratch + a * inner, inner);
  kernels.base_stage(scratch, (inverse ? base_transposed_ : base_).data(), base_order_, inner,
                     scale_, out);
  if (!signs || !inverse) return;
  for (int64_t i = 0; i < count; ++i) out[i] = signs[i] < 0 ? -out[i] : out[i];
}

void FastTransform::apply_row(const Kernels& kernels, float* row, bool inverse) const {
  std::vector<float> scratch(static_cast<size_t>(transform_.block));
  for (int64_t i = 0; i < n_blocks(); ++i) {
    apply_block(kernels, row, i, inverse, scratch.data(), row);
  }
}

void plain_butterflies(float* v, int64_t count) {
  for (int64_t half = 1; half < count; half *= 2) {
    for (int64_t begin = 0; begin < count; begin += 2 * half) {
      for (int64_t i = begin; i < begin + half; ++i) {
        const float a = v[i], b = v[i + half];
        v[i] = a + b;
        v[i + half] = a - b;
      }
    }
  }
}

void plain_base_stage(const float* v, const float* signs, int64_t m, int64_t inner, float scale,
                      float* out) {
  for (int64_t to = 0; to < m; ++to) {
    for (int64_t i = 0; i < inner; ++i) {
      float sum = signs[to] * v[i];
      for (int64_t from = 1; from < m; ++from) sum += signs[from * m + to] * v[from * inner + i];
      out[to * inner + i] = sum * scale;
    }
  }
}

}  // namespace tq
