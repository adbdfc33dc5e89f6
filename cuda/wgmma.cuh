// wgmma.cuh - what Hopper's tensor cores and copy engine need: wgmma of 8-bit operands, bulk copies
// into shared memory, and the barriers between them. Compiled for sm_90a only.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace tq::cuda {

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

__device__ inline float2 load_shared(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address));
  return value;
}

/// A barrier in shared memory that threads arrive at and bulk copies report their bytes to. A phase
/// ends when all have; waiting names the parity of the phase.
struct Barrier {
  uint64_t word;

  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
                 "r"(arrivals));
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  /// Arrives, and lets the phase wait for this many bytes too.
  __device__ void arrive_expecting(uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
        "r"(bytes)
        : "memory");
  }
  __device__ void wait(uint32_t parity) {
    asm volatile(
        "{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; "
        "@!p bra again; }" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
  }
};

/// Makes initialised barriers visible to the copy engine; a __syncthreads() must follow.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// `bytes` (a multiple of 16) from device to shared memory in the background.
__device__ inline void copy_bulk(void* to, const void* from, uint32_t bytes, Barrier& done) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&done))
      : "memory");
}

/// What this thread wrote to shared memory may be read by wgmma after the next barrier.
__device__ inline void publish_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// An operand of wgmma: rows of 128 bytes, K along them, 16-byte words swizzled by the row (word ^
/// row % 8), 8 rows a kilobyte. 32 columns further: descriptor + 2.
__device__ inline uint64_t swizzled_rows(const void* tile) {
  return uint64_t{(shared_address(tile) & 0x3FFFF) >> 4} | uint64_t{1} << 16 | uint64_t{64} << 32 |
         uint64_t{1} << 62;
}

/// Calls visit(offset in y [n_tokens, n_rows], sum) for the lane's sums of 64 rows x tokens, as
/// wgmma leaves them; `row` is its first one, rows and tokens behind the last are left out.
template <typename T, int kCount, typename Visit>
__device__ inline void each_sum(T (&sums)[kCount], int64_t row, int64_t n_rows, int64_t first_token,
                                int64_t n_tokens, const Visit& visit) {
  const bool inside = row < n_rows, inside_8 = row + 8 < n_rows;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const int64_t token = first_token + i / 2 * 8 + lane % 4 * 2 + i % 2;
    if (token >= n_tokens) break;
    const int64_t at = token * n_rows + row;
    T* sum = sums + i / 2 * 4 + i % 2;
    if (inside) visit(at, sum[0]);
    if (inside_8) visit(at + 8, sum[2]);
  }
}

/// Before the first wgmma that reads registers written by other instructions.
__device__ inline void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Registers that a wgmma under way uses: the compiler must not move their uses over this point.
template <int kCount>
__device__ inline void hold(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ inline void hold(int32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Of inline assembly that has sums d[0, n) as its first operands: their names in the text, and the
// operands.
#define TQ_SUM_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TQ_SUM_NAMES_32 \
  TQ_SUM_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TQ_SUM_NAMES_64                                                              \
  TQ_SUM_NAMES_32                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TQ_SUM_NAMES_128                                                                         \
  TQ_SUM_NAMES_64                                                                                \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"
#define TQ_SUMS_4(kind, d, i) kind(d[i]), kind(d[(i) + 1]), kind(d[(i) + 2]), kind(d[(i) + 3])
#define TQ_SUMS_FROM_16(kind, d, i)                                                \
  TQ_SUMS_4(kind, d, i), TQ_SUMS_4(kind, d, (i) + 4), TQ_SUMS_4(kind, d, (i) + 8), \
      TQ_SUMS_4(kind, d, (i) + 12)
#define TQ_SUMS_FROM_64(kind, d, i)                                \
  TQ_SUMS_FROM_16(kind, d, i), TQ_SUMS_FROM_16(kind, d, (i) + 16), \
      TQ_SUMS_FROM_16(kind, d, (i) + 32), TQ_SUMS_FROM_16(kind, d, (i) + 48)
#define TQ_SUMS_16(kind, d) TQ_SUMS_FROM_16(kind, d, 0)
#define TQ_SUMS_32(kind, d) TQ_SUMS_16(kind, d), TQ_SUMS_FROM_16(kind, d, 16)
#define TQ_SUMS_64(kind, d) TQ_SUMS_FROM_64(kind, d, 0)
#define TQ_SUMS_128(kind, d) TQ_SUMS_64(kind, d), TQ_SUMS_FROM_64(kind, d, 64)

// d (+)= A B for a warpgroup, in the background: A [64, 32], each warp 16 rows of it in registers
// as in mma_s8 (mma.cuh); B [32, 2 x registers of d] in shared memory; d as 8-column tiles of
// mma_s8, one after the other. add: whether d takes part. Sums of e4m3 products are exact while
// they are whole numbers below 2^14.

__device__ inline void wgmma(float (&d)[16], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %21, 0; "
      "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {" TQ_SUM_NAMES_16
      "}, {%16, %17, %18, %19}, %20, p, 1, 1; }"
      : TQ_SUMS_16("+f", d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

__device__ inline void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %37, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" TQ_SUM_NAMES_32
      "}, {%32, %33, %34, %35}, %36, p, 1, 1; }"
      : TQ_SUMS_32("+f", d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

__device__ inline void wgmma(int32_t (&d)[16], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %21, 0; "
      "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {" TQ_SUM_NAMES_16
      "}, {%16, %17, %18, %19}, %20, p; }"
      : TQ_SUMS_16("+r", d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

__device__ inline void wgmma(int32_t (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %37, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {" TQ_SUM_NAMES_32
      "}, {%32, %33, %34, %35}, %36, p; }"
      : TQ_SUMS_32("+r", d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

__device__ inline void wgmma(int32_t (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %69, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" TQ_SUM_NAMES_64
      "}, {%64, %65, %66, %67}, %68, p; }"
      : TQ_SUMS_64("+r", d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

__device__ inline void wgmma(int32_t (&d)[128], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %133, 0; "
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" TQ_SUM_NAMES_128
      "}, {%128, %129, %130, %131}, %132, p; }"
      : TQ_SUMS_128("+r", d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

}  // namespace tq::cuda
