// rotation - folding of Hadamard rotations into weights. See rotation.h.
//
// Hadamard rotations are computed in f64 and rounded to f32 once per folded rotation, so that the
// rotated model differs from the original by the rounding of f32 alone.
#include "quant/rotation.h"

#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "model/error.h"
#include "model/hadamard.h"
#include "quant/product.h"
#include "quant/rng.h"

namespace tq {
namespace {

// Columns gathered together when a matrix is transformed along its columns: one cache line of f32.
constexpr int64_t kColumnPanel = 16;

// v <- v (H_m (x) H_2 (x) ... (x) H_2), unscaled, or with H_m^T; the butterflies are symmetric.
void hadamard_block_transform(double* v, int64_t block, bool transposed,
                              std::vector<double>& scratch) {
  const int64_t m = hadamard_base_order(block);
  const int64_t inner = block / m;  // 2^k
  for (int64_t half = 1; half < inner; half *= 2) {
    for (int64_t begin = 0; begin < block; begin += 2 * half) {
      for (int64_t i = begin; i < begin + half; ++i) {
        const double a = v[i], b = v[i + half];
        v[i] = a + b;
        v[i + half] = a - b;
      }
    }
  }
  if (m == 1) return;
  const std::vector<int8_t>& base = hadamard_base(m);
  scratch.assign(static_cast<size_t>(block), 0.0);
  for (int64_t from = 0; from < m; ++from) {
    for (int64_t to = 0; to < m; ++to) {
      const double sign = base[static_cast<size_t>(transposed ? to * m + from : from * m + to)];
      for (int64_t i = 0; i < inner; ++i) {
        scratch[static_cast<size_t>(to * inner + i)] += sign * v[from * inner + i];
      }
    }
  }
  std::copy(scratch.begin(), scratch.end(), v);
}

// v <- v M, or v M^T.
void dense_transform(const Matrix& m, double* v, bool transposed, std::vector<double>& scratch) {
  std::vector<float> row(static_cast<size_t>(m.cols));
  scratch.assign(row.size(), 0.0);
  for (int64_t i = 0; i < m.rows; ++i) {
    matrix_row_f32(m, i, row.data());
    for (size_t j = 0; j < row.size(); ++j) {
      if (transposed) {
        scratch[static_cast<size_t>(i)] += v[j] * double{row[j]};
      } else {
        scratch[j] += v[i] * double{row[j]};
      }
    }
  }
  std::copy(scratch.begin(), scratch.end(), v);
}

void apply_with_scratch(const Transform& transform, double* v, bool inverse,
                        std::vector<double>& scratch) {
  if (!transform.active()) return;
  if (transform.kind == Transform::Kind::kDense) {
    return dense_transform(transform.matrix, v, inverse, scratch);
  }
  const double scale = 1.0 / std::sqrt(static_cast<double>(transform.block));
  const auto multiply_signs = [&] {
    if (!transform.signs) return;
    for (int64_t i = 0; i < transform.size; ++i) v[i] *= transform.signs[i];
  };
  if (!inverse) multiply_signs();
  for (int64_t begin = 0; begin < transform.size; begin += transform.block) {
    hadamard_block_transform(v + begin, transform.block, inverse, scratch);
  }
  for (int64_t i = 0; i < transform.size; ++i) v[i] *= scale;
  if (inverse) multiply_signs();
}

}  // namespace

Rotation Rotation::plain_hadamard(int64_t size) {
  Rotation rotation;
  rotation.transform.kind = Transform::Kind::kHadamard;
  rotation.transform.size = size;
  rotation.transform.block = hadamard_block(size);
  return rotation;
}

Rotation Rotation::random_hadamard(int64_t size, uint64_t seed, uint64_t stream) {
  Rotation rotation = plain_hadamard(size);
  SplitMix64 rng(seed, stream);
  rotation.signs.resize(static_cast<size_t>(size));
  for (int8_t& sign : rotation.signs) sign = rng.sign();
  rotation.transform.signs = rotation.signs.data();
  return rotation;
}

void apply_transform(const Transform& transform, double* v, bool inverse) {
  std::vector<double> scratch;
  apply_with_scratch(transform, v, inverse, scratch);
}

void transform_rows(FloatMatrix& w, const Transform& transform, int64_t repeat, int threads) {
  if (!transform.active()) return;
  TQ_CHECK(transform.size * repeat == w.cols);
  if (transform.kind == Transform::Kind::kDense) {
    const int64_t rows = w.rows, cols = w.cols;
    w.rows = rows * repeat;  // every block as a row
    w.cols = transform.size;
    w = product_nn(w, to_float_matrix(transform.matrix), threads);
    w.rows = rows;
    w.cols = cols;
    return;
  }
  parallel_ranges(threads, w.rows, [&](int64_t begin, int64_t end, int) {
    std::vector<double> row(static_cast<size_t>(w.cols)), scratch;
    for (int64_t i = begin; i < end; ++i) {
      std::copy_n(w.row(i), w.cols, row.data());
      for (int64_t r = 0; r < repeat; ++r) {
        apply_with_scratch(transform, row.data() + r * transform.size, false, scratch);
      }
      std::transform(row.begin(), row.end(), w.row(i),
                     [](double value) { return static_cast<float>(value); });
    }
  });
}

void transform_columns(FloatMatrix& w, const Transform& transform, int64_t repeat, int threads) {
  if (!transform.active()) return;
  TQ_CHECK(transform.size * repeat == w.rows);
  const auto panels = [&](int64_t begin, int64_t end, int) {
    std::vector<double> panel(static_cast<size_t>(w.rows * kColumnPanel)), scratch;
    for (int64_t first = begin; first < end; first += kColumnPanel) {
      const int64_t count = std::min(kColumnPanel, w.cols - first);
      for (int64_t row = 0; row < w.rows; ++row) {
        for (int64_t c = 0; c < count; ++c) panel[c * w.rows + row] = w.row(row)[first + c];
      }
      for (int64_t c = 0; c < count; ++c) {
        for (int64_t r = 0; r < repeat; ++r) {
          apply_with_scratch(transform, panel.data() + c * w.rows + r * transform.size, false,
                             scratch);
        }
      }
      for (int64_t row = 0; row < w.rows; ++row) {
        for (int64_t c = 0; c < count; ++c) {
          w.row(row)[first + c] = static_cast<float>(panel[c * w.rows + row]);
        }
      }
    }
  };
  parallel_ranges(threads, w.cols, panels, kColumnPanel);
}

void fold_norm_gains(FloatLayer& layer, int threads) {
  const auto fold = [&](LinearIndex index, const std::vector<float>& gain) {
    FloatMatrix& w = layer.linears[index];
    parallel_ranges(threads, w.rows, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t col = 0; col < w.cols; ++col)
          w.row(row)[col] *= gain[static_cast<size_t>(col)];
      }
    });
  };
  for (LinearIndex index : {kWq, kWk, kWv}) fold(index, layer.attn_norm);
  for (LinearIndex index : {kWGate, kWUp}) fold(index, layer.ffn_norm);
  std::fill(layer.attn_norm.begin(), layer.attn_norm.end(), 1.0f);
  std::fill(layer.ffn_norm.begin(), layer.ffn_norm.end(), 1.0f);
}

void rotate_layer(FloatLayer& layer, const Config& config, const Transform& residual,
                  const Transform& heads, const Transform& down, int threads) {
  for (LinearIndex index : {kWq, kWk, kWv, kWGate, kWUp}) {
    transform_rows(layer.linears[index], residual, 1, threads);
  }
  for (LinearIndex index : {kWo, kWDown}) {
    transform_columns(layer.linears[index], residual, 1, threads);
  }
  // Attention mixes positions, never the coordinates of a value vector: any orthogonal matrix on
  // the head_dim axis of v passes through it and is undone by wo.
  transform_columns(layer.linears[kWv], heads, config.n_kv_heads, threads);
  transform_rows(layer.linears[kWo], heads, config.n_heads, threads);
  transform_rows(layer.linears[kWDown], down, 1, threads);
  layer.down_input = down;
}

}  // namespace tq
