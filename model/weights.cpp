// weights - see weights.h. Element access for tests, embedding rows and slow paths; the kernels
// have their own.
#include "model/weights.h"

#include <cmath>
#include <filesystem>

#include "model/error.h"
#include "model/tq_file.h"

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

}  // namespace tq
