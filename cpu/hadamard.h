// hadamard - the fast orthogonal transform of a row vector (model/weights.h, Transform).
//
// y = (x * diag(signs)) H / sqrt(block), block by block, H = H_m (x) H_2 (x) ... (x) H_2. Not here:
// which orders exist (model/hadamard.h). Read next: cpu_backend.cpp.
#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "model/weights.h"

namespace tq {

/// One transform, ready to run. Keeps a pointer to the signs: must not outlive the Model.
class FastTransform {
 public:
  FastTransform() = default;
  explicit FastTransform(const Transform& transform);
  bool active() const { return transform_.active(); }
  int64_t size() const { return transform_.size; }
  int64_t block() const { return transform_.block; }
  int64_t n_blocks() const { return transform_.size / transform_.block; }
  bool same_as(const FastTransform& other) const;

  /// out[block] <- transform(x[block]); x and out are whole rows [size] and may be the same.
  /// scratch has block() floats.
  void apply_block(const Kernels& kernels, const float* x, int64_t block_index, bool inverse,
                   float* scratch, float* out) const;
  /// One row [size] in place.
  void apply_row(const Kernels& kernels, float* row, bool inverse) const;

 private:
  Transform transform_;
  int64_t base_order_ = 1;
  std::vector<float> base_, base_transposed_;  // [m, m] of +1 / -1
  float scale_ = 1.0f;                         // 1 / sqrt(block)
};

void plain_butterflies(float* v, int64_t count);
void plain_base_stage(const float* v, const float* signs, int64_t m, int64_t inner, float scale,
                      float* out);

}  // namespace tq
