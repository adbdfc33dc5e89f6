// matmul - the plain dense kernel and the cutting of products into jobs. See matmul.h.
//
// dense - y = x W^T
// Shapes    x [n, cols] f32, W [rows, cols] f32 | f16 | bf16, y [n, y_stride] f32
// Work      one output at a time
// Error     cols * 2^-24 * sum |x w| at most; tests/test_cpu_matmul.cpp
#include "cpu/matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/ops.h"
#include "model/error.h"
#include "model/tensor.h"

namespace tq {
namespace {

float load(DenseType type, const std::byte* row, int64_t index) {
  if (type == DenseType::kF32) {
    float value;
    std::memcpy(&value, row + 4 * index, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, row + 2 * index, 2);
  return type == DenseType::kF16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

}  // namespace

void plain_dense(const DenseJob& job) {
  const int64_t element_bytes = job.type == DenseType::kF32 ? 4 : 2;
  const int64_t padded = round_up(job.cols, kLanes);
  for (int64_t token = job.token_begin; token < job.token_end; ++token) {
    const float* x = job.x + token * job.cols;
    for (int64_t row = job.row_begin; row < job.row_end; ++row) {
      const std::byte* w = job.w + row * job.cols * element_bytes;
      float lanes[kLanes] = {};
      // The vector kernels read zeros behind the last column; 0 * 0 + (-0) is +0, so we do too.
      for (int64_t k = 0; k < padded; ++k) {
        const bool inside = k < job.cols;
        const float factor = inside ? x[k] : 0.0f;
        const float weight = inside ? load(job.type, w, k) : 0.0f;
        lanes[k % kLanes] = std::fma(factor, weight, lanes[k % kLanes]);
      }
      float& y = job.y[token * job.y_stride + row];
      y = job.accumulate ? y + sum_lanes(lanes) : sum_lanes(lanes);
    }
  }
}

DenseJob dense_job(const Matrix& w, const float* x, float* y, int64_t n_tokens) {
  TQ_CHECK(!w.packed());
  DenseJob job = {};
  job.type = w.storage == Storage::kF32   ? DenseType::kF32
             : w.storage == Storage::kF16 ? DenseType::kF16
                                          : DenseType::kBF16;
  job.w = w.data;
  job.x = x;
  job.y = y;
  job.cols = w.cols;
  job.y_stride = w.rows;
  job.row_end = w.rows;
  job.token_end = n_tokens;
  return job;
}

WorkGrid plan_grid(int64_t n_tokens, int64_t n_rows, int64_t row_bytes, int64_t token_bytes,
                   int64_t row_step, int n_threads) {
  // A third of a 1 MB second-level cache for each side.
  constexpr int64_t kSideBytes = 320 << 10;
  constexpr int64_t kTokenStep = 24;  // a multiple of every kernel's token tile
  const int64_t min_items = n_threads > 1 ? 4 * int64_t{n_threads} : 1;
  WorkGrid grid;
  grid.n_tokens = n_tokens;
  grid.n_rows = n_rows;
  grid.token_block = std::max(kTokenStep, kSideBytes / token_bytes / kTokenStep * kTokenStep);
  grid.token_block = std::min(grid.token_block, round_up(n_tokens, kTokenStep));
  grid.row_block = std::max(row_step, kSideBytes / row_bytes / row_step * row_step);
  grid.row_block = std::min(grid.row_block, round_up(n_rows, row_step));
  // Halve the larger side until every thread has something to do.
  while (grid.n_items() < min_items) {
    if (grid.row_block > row_step && (grid.token_block <= 4 * kTokenStep || grid.row_block > 64)) {
      grid.row_block = round_up(grid.row_block / 2, row_step);
    } else if (grid.token_block > kTokenStep) {
      grid.token_block = round_up(grid.token_block / 2, kTokenStep);
    } else {
      break;
    }
  }
  return grid;
}

}  // namespace tq
