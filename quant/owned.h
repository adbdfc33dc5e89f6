// owned - matrices, linears and layers that own their bytes: what the quantizer produces.
//
// The layout is that of model/weights.h; view() gives the non-owning type that the writer and the
// forward pass read. Not here: how the codes are found (rounding.h). Read next: rounding.h.
#pragma once

#include <array>
#include <optional>
#include <span>
#include <vector>

#include "model/weights.h"

namespace tq {

/// Position of a linear in kLayerLinears: q, k, v, o, gate, up, down.
enum LinearIndex { kWq, kWk, kWv, kWo, kWGate, kWUp, kWDown, kNLinears };

/// A matrix in the file's layout that owns its elements or codes.
struct OwnedMatrix {
  Storage storage = Storage::kF32;
  int64_t rows = 0, cols = 0, group = 0;
  std::vector<std::byte> data;
  std::vector<uint16_t> scales;

  Matrix view() const;  // valid while *this lives and is not moved
  size_t n_bytes() const { return data.size() + 2 * scales.size(); }
};

struct OwnedLinear {
  OwnedMatrix weight;
  std::optional<OwnedMatrix> branch_a, branch_b;
  Transform input;
  ActQuant act;
  std::vector<int8_t> exponents;  // [out] or empty: Linear::exponents

  Linear view() const;
  size_t n_bytes() const;
};

/// model/weights.h, LowRankStep.
struct OwnedLowRankStep {
  OwnedMatrix a, b;

  LowRankStep view() const { return {a.view(), b.view()}; }
};

/// One quantized layer, ready to be written.
struct OwnedLayer {
  std::vector<float> attn_norm, ffn_norm, q_norm, k_norm;
  std::array<OwnedLinear, kNLinears> linears;
  std::optional<OwnedLowRankStep> attn_skip, ffn_skip;

  Layer view() const;
};

/// A full-precision matrix [rows, cols] in f32, row-major.
struct FloatMatrix {
  int64_t rows = 0, cols = 0;
  std::vector<float> data;

  float* row(int64_t index) { return data.data() + index * cols; }
  const float* row(int64_t index) const { return data.data() + index * cols; }
  int64_t size() const { return rows * cols; }
};

/// One layer of the source model in f32, in whatever basis it was folded into.
struct FloatLayer {
  std::vector<float> attn_norm, ffn_norm, q_norm, k_norm;
  std::array<FloatMatrix, kNLinears> linears;
  Transform down_input;  // online transform before w_down; its weight is already folded
  std::optional<OwnedLowRankStep> attn_skip, ffn_skip;
  // Powers of two that were taken out of the linears (magnitude.h): all equal in a matrix, [out],
  // or empty.
  std::array<std::vector<int8_t>, kNLinears> exponents;

  /// As the forward pass wants it, nothing rounded. Views into *this.
  Layer view() const;
};

/// Copies layer `index` of a model out of its mapping, converted to f32 (exact).
FloatLayer load_float_layer(const Model& model, int64_t index, int threads);

/// The matrix of a packed or dense view, in f32.
FloatMatrix to_float_matrix(const Matrix& matrix);

/// Stores f32 values densely as kF32, kF16 or kBF16 (round to nearest even).
OwnedMatrix store_dense(std::span<const float> values, int64_t rows, int64_t cols, Storage storage);

/// How to store values in 16 bits: kF16, which has three more mantissa bits than bf16, unless a
/// value would be infinite in it or a stretch of 64 would lose more than in bf16, being so small;
/// then kBF16, which has the range of f32; kF32 where a value rounds to infinity in that or a
/// stretch is below all normal numbers.
Storage choose_16_bit(std::span<const float> values);

}  // namespace tq
