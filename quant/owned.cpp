// owned - storage of quantizer results. Plain bookkeeping; see owned.h.
#include "quant/owned.h"

#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "model/error.h"

namespace tq {

Matrix OwnedMatrix::view() const {
  Matrix matrix;
  matrix.storage = storage;
  matrix.rows = rows;
  matrix.cols = cols;
  matrix.group = group;
  matrix.data = data.data();
  matrix.scales = scales.empty() ? nullptr : scales.data();
  return matrix;
}

Linear OwnedLinear::view() const {
  Linear linear;
  linear.weight = weight.view();
  if (branch_a) linear.branch_a = branch_a->view();
  if (branch_b) linear.branch_b = branch_b->view();
  linear.input = input;
  linear.act = act;
  if (!exponents.empty()) linear.exponents = exponents.data();
  return linear;
}

size_t OwnedLinear::n_bytes() const {
  size_t bytes = weight.n_bytes();
  if (branch_a) bytes += branch_a->n_bytes();
  if (branch_b) bytes += branch_b->n_bytes();
  return bytes + exponents.size();
}

Layer OwnedLayer::view() const {
  Layer layer;
  layer.attn_norm = attn_norm;
  layer.ffn_norm = ffn_norm;
  layer.q_norm = q_norm;
  layer.k_norm = k_norm;
  for (int i = 0; i < kNLinears; ++i) {
    layer.*kLayerLinears[i].member = linears[static_cast<size_t>(i)].view();
  }
  if (attn_skip) layer.attn_skip = attn_skip->view();
  if (ffn_skip) layer.ffn_skip = ffn_skip->view();
  return layer;
}

Layer FloatLayer::view() const {
  Layer layer;
  layer.attn_norm = attn_norm;
  layer.ffn_norm = ffn_norm;
  layer.q_norm = q_norm;
  layer.k_norm = k_norm;
  for (int i = 0; i < kNLinears; ++i) {
    const FloatMatrix& source = linears[static_cast<size_t>(i)];
    Linear& linear = layer.*kLayerLinears[i].member;
    linear.weight.storage = Storage::kF32;
    linear.weight.rows = source.rows;
    linear.weight.cols = source.cols;
    linear.weight.data = reinterpret_cast<const std::byte*>(source.data.data());
    const std::vector<int8_t>& powers = exponents[static_cast<size_t>(i)];
    if (!powers.empty()) linear.exponents = powers.data();
  }
  layer.w_down.input = down_input;
  if (attn_skip) layer.attn_skip = attn_skip->view();
  if (ffn_skip) layer.ffn_skip = ffn_skip->view();
  return layer;
}

FloatLayer load_float_layer(const Model& model, int64_t index, int threads) {
  const Layer& source = model.layers[static_cast<size_t>(index)];
  FloatLayer layer;
  layer.attn_norm = source.attn_norm;
  layer.ffn_norm = source.ffn_norm;
  layer.q_norm = source.q_norm;
  layer.k_norm = source.k_norm;
  for (int i = 0; i < kNLinears; ++i) {
    const Matrix& from = (source.*kLayerLinears[i].member).weight;
    FloatMatrix& to = layer.linears[static_cast<size_t>(i)];
    to.rows = from.rows;
    to.cols = from.cols;
    to.data.resize(static_cast<size_t>(from.rows * from.cols));
    parallel_ranges(threads, from.rows, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) matrix_row_f32(from, row, to.row(row));
    });
  }
  return layer;
}

FloatMatrix to_float_matrix(const Matrix& matrix) {
  FloatMatrix result{matrix.rows, matrix.cols, {}};
  result.data.resize(static_cast<size_t>(matrix.rows * matrix.cols));
  for (int64_t row = 0; row < matrix.rows; ++row) matrix_row_f32(matrix, row, result.row(row));
  return result;
}

OwnedMatrix store_dense(std::span<const float> values, int64_t rows, int64_t cols,
                        Storage storage) {
  TQ_CHECK(static_cast<int64_t>(values.size()) == rows * cols);
  OwnedMatrix matrix{storage, rows, cols, 0, {}, {}};
  if (storage == Storage::kF32) {
    const auto bytes = std::as_bytes(values);
    matrix.data.assign(bytes.begin(), bytes.end());
    return matrix;
  }
  TQ_CHECK(storage == Storage::kF16 || storage == Storage::kBF16);
  matrix.data.resize(values.size() * 2);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t bits = storage == Storage::kF16 ? f32_to_f16(values[i]) : f32_to_bf16(values[i]);
    std::memcpy(matrix.data.data() + 2 * i, &bits, 2);
  }
  return matrix;
}

Storage choose_16_bit(std::span<const float> values) {
  // Below 2^-14 f16 is off by up to 2^-25: by 2^-9 of 2^-16, as bf16 is of everything. The limits
  // above are the first values that round to infinity: half a step beyond the largest finite one.
  constexpr size_t kStretch = 64;
  Storage storage = Storage::kF16;
  for (size_t begin = 0; begin < values.size(); begin += kStretch) {
    float largest = 0;
    for (float value : values.subspan(begin, std::min(kStretch, values.size() - begin))) {
      largest = std::max(largest, std::fabs(value));
    }
    if (largest == 0) continue;
    if (!(largest < 0x1.FFp127f) || largest < 0x1p-126f) return Storage::kF32;
    if (!(largest < 65520.0f) || largest < 0x1p-16f) storage = Storage::kBF16;
  }
  return storage;
}

}  // namespace tq
