// eigen - the include of Eigen in quant/; only gl.cpp adds another of its headers, exp(matrix).
//
// Eigen's own threads are off: its GEMM picks block sizes by the number of threads, which would
// change the order of sums. We parallelise over matrices and blocks of columns instead.
#pragma once

#define EIGEN_DONT_PARALLELIZE
#include <Eigen/Dense>

namespace tq {

using MatrixRM = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

}  // namespace tq
