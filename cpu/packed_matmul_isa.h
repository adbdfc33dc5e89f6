// packed_matmul_isa - the packed kernels that need an instruction set. Not to be called without
// isa_supported(); the tables of kernels.h are the only callers.
#pragma once

#include "cpu/kernels.h"

namespace tq {

void avx2_packed(const PackedJob& job);
void avx512_packed(const PackedJob& job);

}  // namespace tq
