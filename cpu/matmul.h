// matmul - dense matrices times tokens in f32, straight from the mapped file.
//
// y[t, r] = sum_k x[t, k] w[r, k]. Each output is 16 partial sums, partial k % 16 taking its
// products in ascending k with one fma each, then a fixed tree of additions (ops.h, sum_lanes). An
// output therefore does not depend on how many tokens or rows are computed with it, on the number
// of threads, or on the instruction set. Not here: 4-bit weights (packed_matmul.h).
// Read next: matmul.cpp (the plain kernel), matmul_avx512.cpp.
#pragma once

#include "cpu/kernels.h"
#include "model/weights.h"

namespace tq {

void plain_dense(const DenseJob& job);

/// A job over all of a dense matrix.
DenseJob dense_job(const Matrix& w, const float* x, float* y, int64_t n_tokens);

/// How a product of n_tokens x n_rows is cut in jobs: item i of n_items() is one rectangle. The cut
/// changes the time only, never a result.
struct WorkGrid {
  int64_t n_tokens = 0, n_rows = 0;
  int64_t token_block = 1, row_block = 1;
  int64_t n_token_blocks() const { return (n_tokens + token_block - 1) / token_block; }
  int64_t n_row_blocks() const { return (n_rows + row_block - 1) / row_block; }
  int64_t n_items() const { return n_token_blocks() * n_row_blocks(); }
  struct Rectangle {
    int64_t token_begin, token_end, row_begin, row_end;
    template <typename Job>
    void limit(Job& job) const {
      job.token_begin = token_begin;
      job.token_end = token_end;
      job.row_begin = row_begin;
      job.row_end = row_end;
    }
  };
  Rectangle at(int64_t item) const {
    const int64_t token = item / n_row_blocks() * token_block;
    const int64_t row = item % n_row_blocks() * row_block;
    return {token, token + token_block < n_tokens ? token + token_block : n_tokens, row,
            row + row_block < n_rows ? row + row_block : n_rows};
  }
};

/// row_bytes: of one weight row; token_bytes: of one token's input; row_step: rows of one kernel
/// panel. Blocks are chosen so that a block of rows and a block of tokens stay in the second-level
/// cache together, and so that there are a few items for each thread.
WorkGrid plan_grid(int64_t n_tokens, int64_t n_rows, int64_t row_bytes, int64_t token_bytes,
                   int64_t row_step, int n_threads);

}  // namespace tq
