// kernels - the plain table and the choice of table. See kernels.h.
#include "cpu/kernels.h"

#include "cpu/attention.h"
#include "cpu/hadamard.h"
#include "cpu/matmul.h"
#include "cpu/ops.h"
#include "cpu/packed_matmul.h"
#include "cpu/softmax.h"

namespace tq {

#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;  // ops_avx2.cpp, ops_avx512.cpp
#endif

namespace {

constexpr Kernels kPlainKernels = {
    .isa = CpuIsa::kPlain,
    .dense = plain_dense,
    .gemm = plain_gemm,
    .packed = plain_packed,
    .round = plain_round,
    .sum_codes = plain_sum_codes,
    .span = plain_span,
    .merge = plain_merge,
    .store_half = plain_store_half,
    .dequant = plain_dequant,
    .exp_sum = plain_exp_sum,
    .butterflies = plain_butterflies,
    .base_stage = plain_base_stage,
    .silu_mul = plain_silu_mul,
    .add = plain_add,
    .scale_gain = plain_scale_gain,
    .max = plain_max,
    .sum_exp = plain_sum_exp,
    .sum_exp_diff = plain_sum_exp_diff,
    .rope = plain_rope,
};

}  // namespace

const Kernels& kernels_for(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa == CpuIsa::kAvx2) return kAvx2Kernels;
  if (isa == CpuIsa::kAvx512) return kAvx512Kernels;
#endif
  return kPlainKernels;
}

}  // namespace tq
