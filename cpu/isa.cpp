// isa - see isa.h.
#include "cpu/isa.h"

namespace tq {

bool isa_supported(CpuIsa isa) {
  if (isa == CpuIsa::kPlain) return true;
#if defined(__x86_64__)
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if !defined(__clang__)  // whose version 14 cannot ask for it; no processor has AVX2 without
  avx2 = avx2 && __builtin_cpu_supports("f16c");
#endif
  if (isa == CpuIsa::kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

CpuIsa best_isa() {
  if (isa_supported(CpuIsa::kAvx512)) return CpuIsa::kAvx512;
  return isa_supported(CpuIsa::kAvx2) ? CpuIsa::kAvx2 : CpuIsa::kPlain;
}

const char* isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kPlain:
      return "plain";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

}  // namespace tq
