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

size_t Linear::n_bytes() const {
  size_t bytes = weight.n_bytes();
  if (branch_a) bytes += branch_a->n_bytes() + branch_b->n_bytes();
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

}  // namespace tq
