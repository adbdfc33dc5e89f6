// rotation - orthogonal changes of basis, folded into the weights of a layer.
//
// A rotated model computes the same function; its weights and activations have no outliers, which
// is what 4-bit grids need. Three places (QuaRot, Ashkboos et al. 2024; SpinQuant section 3):
//   residual  x' = x T for the whole residual stream; T = diag(signs) H / sqrt(dim). Embedding and
//             head stay as they are: Model::residual_basis changes the basis at run time.
//   heads     R2, one per layer, between wv and wo: disappears into the two weights.
//   down      H before w_down, computed at run time (a nonlinearity stands in front of it).
// Weights are [out, in], y = x W^T. A linear that reads the rotated stream becomes W T (each row is
// transformed like an activation); one that writes it becomes T^T W (each column is).
// Not here: the run-time transform (cpu/hadamard.h). Read next: decompose.h.
#pragma once

#include <cstdint>
#include <vector>

#include "quant/owned.h"

namespace tq {

/// The signs of a random Hadamard rotation and the Transform that views them.
struct Rotation {
  Transform transform;
  std::vector<int8_t> signs;  // empty: all +1

  /// diag(random signs) H_block / sqrt(block), block by block; block = hadamard_block(size).
  static Rotation random_hadamard(int64_t size, uint64_t seed, uint64_t stream);
  /// The same without signs.
  static Rotation plain_hadamard(int64_t size);

  Rotation() = default;
  Rotation(Rotation&&) = default;
  Rotation& operator=(Rotation&&) = default;
};

/// v <- v T, or v T^T, T Hadamard or dense. In f64, `v` has transform.size elements.
void apply_transform(const Transform& transform, double* v, bool inverse);

/// Each row r of w <- r T, for a T of cols / repeat columns applied to each of `repeat` blocks.
void transform_rows(FloatMatrix& w, const Transform& transform, int64_t repeat, int threads);
/// Each column c of w <- c T (w <- T^T w), block by block as above.
void transform_columns(FloatMatrix& w, const Transform& transform, int64_t repeat, int threads);

/// Multiplies column j of each weight that reads a norm's output by the norm's gain, and sets the
/// gain to one. After this the norm commutes with rotations (RMSNorm section of SliceGPT, 2024).
void fold_norm_gains(FloatLayer& layer, int threads);

/// Folds all three rotations into a layer whose norm gains are folded already. `residual` may be
/// inactive; `heads` has head_dim elements; `down` is stored as the online transform of w_down.
void rotate_layer(FloatLayer& layer, const Config& config, const Transform& residual,
                  const Transform& heads, const Transform& down, int threads);

}  // namespace tq
