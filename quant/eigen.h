// eigen - the include of Eigen in quant/; only gl.cpp adds another of its headers, exp(matrix).
//
// Eigen's own threads are off: its GEMM picks block sizes by the number of threads, which would
// change the order of sums. We parallelise over matrices and blocks of columns instead. For the
// same reason fix_block_sizes() keeps it from asking the CPU for the sizes of its caches.
#pragma once

#define EIGEN_DONT_PARALLELIZE
#include <Eigen/Dense>

namespace tq {

using MatrixRM = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Makes sums come out alike on every CPU: caches are taken for 32 KB, 1 MB and 8 MB, whatever they
/// are. To be called once before work begins.
inline void fix_block_sizes() {
  Eigen::setCpuCacheSizes(32 << 10, 1 << 20, 8 << 20);
}

}  // namespace tq
