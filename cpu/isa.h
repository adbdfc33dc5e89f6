// isa - which instruction set the kernels of cpu/ use. Chosen once, at run time.
//
// Every kernel gives the same bits on all three (each file says how), so the choice is about speed
// alone. Read next: kernels.h.
#pragma once

namespace tq {

enum class CpuIsa {
  kPlain,  // portable C++, the reference
  kAvx2,   // AVX2, FMA, F16C
  kAvx512  // AVX-512 F, BW, VL, DQ, VNNI, and all of kAvx2
};

/// Whether this machine can run it.
bool isa_supported(CpuIsa isa);
/// The fastest one that this machine can run.
CpuIsa best_isa();
const char* isa_name(CpuIsa isa);  // "plain", "avx2", "avx512"

}  // namespace tq
