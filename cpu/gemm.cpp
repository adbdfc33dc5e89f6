// gemm - the plain kernel and the cutting of products into jobs. See gemm.h.
//
// gemm - c (+)= a b
// Shapes    a [rows, depth], b [depth, cols], c [rows, cols] f32, strides
// Work      one element at a time
// Error     (kGemmDepth + depth / kGemmDepth) * 2^-24 * sum |a b|; tests/test_gemm.cpp
#include "cpu/gemm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "model/tensor.h"

namespace tq {
namespace {

// Products that one thread finishes in some ten microseconds (linear.cpp has the same limit).
constexpr int64_t kMacsForThreads = 200'000;
// Rows of c below which packing b costs more than a tenth of the product.
constexpr int64_t kMinRows = 48;

int64_t divide_up(int64_t value, int64_t step) {
  return (value + step - 1) / step;
}

// Length of the pieces when `total` is cut in pieces of at most `most`, nearly equal, a multiple of
// `step`.
int64_t piece_length(int64_t total, int64_t most, int64_t step) {
  const int64_t n_pieces = std::max<int64_t>(1, divide_up(total, most));
  return std::max(step, divide_up(divide_up(total, n_pieces), step) * step);
}

// The cut changes the time only, never a result.
struct Cut {
  int64_t row_block, col_block, n_row_blocks, n_col_blocks;
  Cut(const GemmJob& job, int64_t min_items) {
    col_block = piece_length(job.cols, kGemmCols, 64);
    n_col_blocks = divide_up(job.cols, col_block);
    const int64_t wanted = divide_up(min_items, std::max<int64_t>(1, n_col_blocks));
    row_block = std::max(kMinRows, piece_length(job.rows, divide_up(job.rows, wanted), 6));
    n_row_blocks = divide_up(job.rows, row_block);
  }
  int64_t n_items() const { return n_row_blocks * n_col_blocks; }
};

GemmJob part_of(const GemmJob& job, const Cut& cut, int64_t item) {
  const int64_t row = item / cut.n_col_blocks * cut.row_block;
  const int64_t col = item % cut.n_col_blocks * cut.col_block;
  GemmJob part = job;
  part.a += row * job.a_row;
  part.b += col * job.b_col;
  part.c += row * job.c_row + col;
  part.rows = std::min(cut.row_block, job.rows - row);
  part.cols = std::min(cut.col_block, job.cols - col);
  return part;
}

}  // namespace

void plain_gemm(const GemmJob& job) {
  for (int64_t i = 0; i < job.rows; ++i) {
    for (int64_t j = 0; j < job.cols; ++j) {
      float& c = job.c[i * job.c_row + j];
      if (!job.accumulate) c = 0.0f;
      for (int64_t begin = 0; begin < job.depth; begin += kGemmDepth) {
        float sum = 0.0f;
        for (int64_t k = begin; k < std::min(begin + kGemmDepth, job.depth); ++k) {
          const float a = job.a[i * job.a_row + k * job.a_depth];
          sum = std::fma(a, job.b[k * job.b_depth + j * job.b_col], sum);
        }
        c += sum;
      }
    }
  }
}

void run_gemms(const Kernels& kernels, int n_threads, std::span<const GemmJob> jobs) {
  int64_t macs = 0;
  for (const GemmJob& job : jobs) macs += job.rows * job.cols * job.depth;
  if (macs < kMacsForThreads) n_threads = 1;
  const int64_t min_items = n_threads > 1 ? 4 * n_threads : 1;
  std::vector<Cut> cuts;
  int64_t n_items = 0, n_scratch = 0;
  for (const GemmJob& job : jobs) {
    n_scratch = std::max(n_scratch, gemm_scratch(job.cols, job.depth));
    cuts.emplace_back(job, divide_up(min_items, static_cast<int64_t>(jobs.size())));
    n_items += cuts.back().n_items();
  }
  PerWorker<AlignedBuffer> scratch(n_threads);
  parallel_items(n_threads, n_items, [&](int64_t item, int worker) {
    size_t which = 0;
    int64_t index = item;
    while (index >= cuts[which].n_items()) index -= cuts[which++].n_items();
    GemmJob part = part_of(jobs[which], cuts[which], index);
    part.scratch = scratch.get(worker, static_cast<size_t>(n_scratch) * sizeof(float)).as<float>();
    kernels.gemm(part);
  });
}

}  // namespace tq
