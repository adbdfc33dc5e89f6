// linear - one call of Backend::linears: transform, rounding, products, low-rank branch.
//
// Not here: the kernels. Read next: linear.cpp.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "cpu/hadamard.h"
#include "cpu/packed_matmul.h"
#include "model/backend.h"

namespace tq {

/// A linear as the CPU runs it. Dense matrices stay where they are; packed ones are repacked when
/// their input is rounded, and read from the file's layout when it is not (act.bits = 16).
/// The number that a token's two-level scales are multiples of (ActQuant); 0 where the rounding has
/// none. codes [cols]: room to work in.
float token_unit(const Kernels& kernels, const float* x, int64_t cols, const ActQuant& act,
                 int8_t* codes);

class CpuLinear : public PreparedLinear {
 public:
  CpuLinear(const Linear& linear, int n_threads);
  const Linear& linear() const { return linear_; }
  const FastTransform& transform() const { return transform_; }
  bool rounds_input() const { return linear_.act.bits < 16; }

  std::optional<PackedPanels> weight, branch_a, branch_b;  // set where the integer path is used

 private:
  Linear linear_;
  FastTransform transform_;
};

/// Row of any matrix as f32 [cols] (model/weights.h, matrix_row_f32), by the kernels.
void expand_row(const Kernels& kernels, const Matrix& w, int64_t row, float* out);

/// Working memory of run_linears(), kept between calls.
struct LinearScratch {
  AlignedBuffer memory;
};

/// out[j] = weights[j](x) for `rows` tokens; all weights share in_dim and transform.
void run_linears(const Kernels& kernels, std::span<const CpuLinear* const> weights, const float* x,
                 int64_t rows, std::span<float* const> out, int n_threads, LinearScratch& scratch);

}  // namespace tq
