// bench_cublas - see bench_cublas.h.
#include "tests/bench_cublas.h"

#include "model/error.h"

namespace tq::cuda {
namespace {

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw Error(ErrorKind::kResource, "cuBLASLt failed", what, cublasLtGetStatusString(status));
  }
}

}  // namespace

CublasProduct::CublasProduct(Yardstick type, int64_t m, int64_t out, int64_t in)
    : type_(type),
      m_(m),
      out_(out),
      in_(in),
      element_bytes_(type == Yardstick::kBf16 ? 2 : 1),
      workspace_(kWorkspace, "bench") {
  const bool int8 = type == Yardstick::kInt8;
  const cudaDataType element = type == Yardstick::kBf16  ? CUDA_R_16BF
                               : type == Yardstick::kFp8 ? CUDA_R_8F_E4M3
                                                         : CUDA_R_8I;
  check(cublasLtCreate(&handle_), "cublasLtCreate");
  check(cublasLtMatmulDescCreate(&product_, int8 ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F,
                                 int8 ? CUDA_R_32I : CUDA_R_32F),
        "cublasLtMatmulDescCreate");
  // Column by column, as the library counts, y^T [out, m] = W [in, out]^T x^T [in, m].
  const cublasOperation_t transposed = CUBLAS_OP_T;
  check(cublasLtMatmulDescSetAttribute(product_, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                       sizeof(transposed)),
        "cublasLtMatmulDescSetAttribute");
  const auto layout = [](cublasLtMatrixLayout_t& to, cudaDataType kind, int64_t rows,
                         int64_t cols) {
    check(cublasLtMatrixLayoutCreate(&to, kind, static_cast<uint64_t>(rows),
                                     static_cast<uint64_t>(cols), rows),
          "cublasLtMatrixLayoutCreate");
  };
  layout(w_, element, in, out);
  layout(x_, element, in, m);
  layout(y_, int8 ? CUDA_R_32I : CUDA_R_16BF, out, m);
  cublasLtMatmulPreference_t preference = nullptr;
  check(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
  const size_t bytes = kWorkspace;
  check(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &bytes, sizeof(bytes)),
        "cublasLtMatmulPreferenceSetAttribute");
  const cublasStatus_t found = cublasLtMatmulAlgoGetHeuristic(handle_, product_, w_, x_, y_, y_,
                                                              preference, kWays, ways_, &n_ways_);
  cublasLtMatmulPreferenceDestroy(preference);
  if (found != CUBLAS_STATUS_SUCCESS) n_ways_ = 0;  // it has none
}

CublasProduct::~CublasProduct() {
  cublasLtMatrixLayoutDestroy(y_);
  cublasLtMatrixLayoutDestroy(x_);
  cublasLtMatrixLayoutDestroy(w_);
  cublasLtMatmulDescDestroy(product_);
  cublasLtDestroy(handle_);
}

void CublasProduct::run(int way, const void* w, const void* x, void* y, cudaStream_t stream) const {
  const float one = 1, zero = 0;
  const int32_t int_one = 1, int_zero = 0;
  const bool int8 = type_ == Yardstick::kInt8;
  check(cublasLtMatmul(handle_, product_, int8 ? static_cast<const void*>(&int_one) : &one, w, w_,
                       x, x_, int8 ? static_cast<const void*>(&int_zero) : &zero, y, y_, y, y_,
                       &ways_[way].algo, workspace_.as<void>(), kWorkspace, stream),
        "cublasLtMatmul");
}

}  // namespace tq::cuda
