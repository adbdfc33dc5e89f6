// gemm - f32 products of matrices in any of the three orders that training needs.
//
// c[i, j] (+)= sum_k a(i, k) b(k, j), where a and b are read through strides: x w^T, x w and x^T w
// are the same kernel, so backward passes need no transposed copy. The sum is cut in blocks of
// kGemmDepth products: each block is one chain of fma in ascending k from 0, and blocks are added
// to c in ascending order. An element of c therefore depends on neither the number of threads, nor
// the instruction set, nor the size of the rest. Not here: weights in other formats and the sums
// of the runtime (matmul.h, whose order of addition is another one).
// Read next: gemm.cpp (the plain kernel), gemm_kernel.h (the fast one).
#pragma once

#include <cstdint>
#include <span>

namespace tq {

/// Products of one chain; also the depth of the panels that the fast kernel packs.
constexpr int64_t kGemmDepth = 256;
/// Columns of c that the fast kernel works on with one packed b: 512 * 256 floats = 512 KB, half of
/// a second-level cache.
constexpr int64_t kGemmCols = 512;
/// Floats of scratch of a job: a panel of 8 rows of a, and packed b.
constexpr int64_t gemm_scratch(int64_t cols, int64_t depth) {
  const int64_t width = (cols + 15) / 16 * 16;
  return kGemmDepth * 8 +
         (depth < kGemmDepth ? depth : kGemmDepth) * (width < kGemmCols ? width : kGemmCols);
}

/// One rectangle of c for one thread. One stride of a and one of b are 1, or the kernel is slow.
struct GemmJob {
  const float* a;  // element (i, k) at i * a_row + k * a_depth
  int64_t a_row, a_depth;
  const float* b;  // element (k, j) at k * b_depth + j * b_col
  int64_t b_depth, b_col;
  float* c;  // element (i, j) at i * c_row + j
  int64_t c_row;
  int64_t rows, cols, depth;
  bool accumulate;  // c += instead of c =
  float* scratch;   // [gemm_scratch(cols, depth)], aligned to 64 bytes
};

struct Kernels;

void plain_gemm(const GemmJob& job);

/// All of `jobs` (their c do not overlap; scratch is ignored) on n_threads threads.
void run_gemms(const Kernels& kernels, int n_threads, std::span<const GemmJob> jobs);

}  // namespace tq
