// weights - see weights.h. Element access for tests, embedding rows and slow paths; the kernels
// have their own.
#include "model/weights.h"

#include <cmath>

#include "model/error.h"

namespace tq {

const NamedLinear kLayerLinears[7] = {{"wq", &Layer::wq},         {"wk", &Layer::wk},
                                      {"wv", &Layer::wv},         {"wo", &Layer::wo},
                                      {"w_gate", &Layer::w_gate}, {"w_up", &Layer::w_up},
                                      {"w_down", &Layer::w_down}};

const NamedSkip kLayerSkips[2] = {{"attn_skip", &Layer::attn_skip}, {"ffn_skip", &Layer::ffn_skip}};

size_t transform_bytes(const Transform& transform) {
  if (transform.kind == Transform::Kind::kDense) return transform.matrix.n_bytes();
  return transform.signs ? static_cast<size_t>(transform.size) : 0;
}

size_t skip_bytes(const Layer& layer) {
  size_t bytes = 0;
  for (const NamedSkip& named : kLayerSkips) {
    const auto& skip = layer.*named.member;
    if (skip) bytes += skip->a.n_bytes() + skip->b.n_bytes();
  }
  return bytes;
}

int64_t Matrix::row_bytes() const {
  switch (storage) {
    case Storage::kF32:
      return 4 * cols;
    case Storage::kF16:
    case Storage::kBF16:
      return 2 * cols;
    case Storage::kQ4:
      return (cols + 1) / 2;
    case Storage::kQ8:
      return cols;
  }
  return 0;
}

ActQuant ActQuant::narrow(int64_t rank, int64_t b_group) const {
  return {bits, two_level && bits == 8 ? rank : b_group, 1.0f, codes, two_level};
}

size_t Linear::n_bytes() const {
  size_t bytes = weight.n_bytes();
  if (branch_a) bytes += branch_a->n_bytes() + branch_b->n_bytes();
  if (exponents) bytes += static_cast<size_t>(out_dim());
  return bytes;
}

int packed_code(const Matrix& matrix, int64_t row, int64_t col) {
  TQ_CHECK(matrix.packed());
  const std::byte* begin = matrix.data + row * matrix.row_bytes();
  if (matrix.storage == Storage::kQ8) return static_cast<int8_t>(begin[col]);
  const int byte = static_cast<int>(begin[col / 2]);
  return (col % 2 ? byte >> 4 : byte & 15) - 8;
}

void matrix_row_f32(const Matrix& matrix, int64_t row, float* out) {
  if (!matrix.packed()) {
    const DType dtype = matrix.storage == Storage::kF32   ? DType::kF32
                        : matrix.storage == Storage::kF16 ? DType::kF16
                                                          : DType::kBF16;
    convert_to_f32({dtype, {matrix.rows, matrix.cols}, matrix.data}, row * matrix.cols, matrix.cols,
                   out);
    return;
  }
  const uint16_t* scales = matrix.scales + row * matrix.n_groups();
  for (int64_t col = 0; col < matrix.cols; ++col) {
    out[col] =
        f16_to_f32(scales[col / matrix.group]) * static_cast<float>(packed_code(matrix, row, col));
  }
}

void check_finite(const Matrix& matrix, const std::string& name, const std::string& where) {
  std::vector<float> values(static_cast<size_t>(matrix.cols));
  int64_t count = 0, first_row = 0, first_col = 0;
  for (int64_t row = 0; row < matrix.rows; ++row) {
    matrix_row_f32(matrix, row, values.data());
    for (int64_t col = 0; col < matrix.cols; ++col) {
      if (std::isfinite(values[static_cast<size_t>(col)])) continue;
      if (count++ > 0) continue;
      first_row = row;
      first_col = col;
    }
  }
  if (count == 0) return;
  throw Error(ErrorKind::kBadData, "weights are not finite", where,
              name + " has " + std::to_string(count) + " NaN or infinite values, the first at [" +
                  std::to_string(first_row) + ", " + std::to_string(first_col) + "]");
}

double orthogonality_error(const Matrix& matrix) {
  TQ_CHECK(matrix.rows == matrix.cols && !matrix.packed());
  constexpr size_t kProbes = 4;
  const size_t n = static_cast<size_t>(matrix.rows);
  // Bit `probe` of a mixed index decides a sign (finaliser of SplitMix64).
  std::vector<double> signs(kProbes * n), sums(kProbes * n);
  for (size_t j = 0; j < n; ++j) {
    uint64_t mixed = (j + 1) * 0x9E3779B97F4A7C15ull;
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9ull;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBull;
    mixed ^= mixed >> 31;
    for (size_t probe = 0; probe < kProbes; ++probe) {
      signs[probe * n + j] = mixed >> probe & 1 ? 1.0 : -1.0;
    }
  }
  // M^T (M z), one row of M after the other, for all probes at once.
  std::vector<float> row(n);
  for (size_t i = 0; i < n; ++i) {
    matrix_row_f32(matrix, static_cast<int64_t>(i), row.data());
    for (size_t probe = 0; probe < kProbes; ++probe) {
      const double* z = signs.data() + probe * n;
      double* sum = sums.data() + probe * n;
      double dot = 0;
      for (size_t j = 0; j < n; ++j) dot += double{row[j]} * z[j];
      for (size_t j = 0; j < n; ++j) sum[j] += double{row[j]} * dot;
    }
  }
  double worst = 0;
  for (size_t probe = 0; probe < kProbes; ++probe) {
    double square = 0;
    for (size_t j = probe * n; j < (probe + 1) * n; ++j) {
      square += (sums[j] - signs[j]) * (sums[j] - signs[j]);
    }
    const double mean = std::sqrt(square / static_cast<double>(n));
    if (!(mean <= worst)) worst = mean;  // a NaN must not be lost
  }
  return worst;
}

}  // namespace tq
