// ops_avx512 - the table of kernels for AVX-512. Written in lane_kernels.h and span_kernel.h.
//
// Built with the flags of this instruction set; only kernels.cpp reaches it, after a CPUID check.
// GCC 12 takes the "undefined" operands inside its own intrinsics for our mistake (bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "cpu/lanes_avx512.h"
// The kernels below are templates over the Lanes of the header above.
#include "cpu/gemm_kernel.h"
#include "cpu/lane_kernels.h"
#include "cpu/packed_matmul_isa.h"
#include "cpu/span_kernel.h"

namespace tq {

extern const Kernels kAvx512Kernels;
const Kernels kAvx512Kernels = {
    .isa = CpuIsa::kAvx512,
    .dense = lanes_dense,
    .gemm = lanes_gemm,
    .packed = avx512_packed,
    .round = lanes_round,
    .sum_codes = lanes_sum_codes,
    .span = lanes_span,
    .merge = lanes_merge,
    .store_half = lanes_store_half,
    .dequant = lanes_dequant,
    .exp_sum = lanes_exp_sum,
    .butterflies = lanes_butterflies,
    .base_stage = lanes_base_stage,
    .silu_mul = lanes_silu_mul,
    .add = lanes_add,
    .scale_gain = lanes_scale_gain,
    .max = lanes_max,
    .sum_exp = lanes_sum_exp,
    .sum_exp_diff = lanes_sum_exp_diff,
    .rope = lanes_rope,
};

}  // namespace tq
