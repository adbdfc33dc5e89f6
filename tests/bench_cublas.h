// bench_cublas - the yardstick of bench_cuda: the same product by cuBLASLt, in three types.
//
// Only the benchmark links cuBLASLt. Read next: bench_cuda.cu.
#pragma once

#include <cublasLt.h>

#include <cstdint>

#include "cuda/device.h"

namespace tq::cuda {

enum class Yardstick { kBf16, kFp8, kInt8 };

/// y [m, out] = x [m, in] W^T, W [out, in]. Output bf16, for kInt8 int32. No scales.
class CublasProduct {
 public:
  /// Throws kResource where cuBLASLt fails.
  CublasProduct(Yardstick type, int64_t m, int64_t out, int64_t in);
  ~CublasProduct();
  CublasProduct(const CublasProduct&) = delete;
  CublasProduct& operator=(const CublasProduct&) = delete;

  /// Ways that the library offers, its best guess first; 0 where it has none (fp8 and int8 want
  /// multiples of 16).
  int n_ways() const { return n_ways_; }
  int64_t weight_bytes() const { return out_ * in_ * element_bytes_; }
  int64_t input_bytes() const { return m_ * in_ * element_bytes_; }
  int64_t output_bytes() const { return m_ * out_ * 4; }
  /// Enqueues the product by one of the ways.
  void run(int way, const void* w, const void* x, void* y, cudaStream_t stream) const;

 private:
  static constexpr int kWays = 4;
  static constexpr int64_t kWorkspace = int64_t{64} << 20;
  Yardstick type_;
  int64_t m_, out_, in_, element_bytes_;
  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulDesc_t product_ = nullptr;
  cublasLtMatrixLayout_t w_ = nullptr, x_ = nullptr, y_ = nullptr;
  cublasLtMatmulHeuristicResult_t ways_[kWays] = {};
  int n_ways_ = 0;
  DeviceMemory workspace_;
};

}  // namespace tq::cuda
