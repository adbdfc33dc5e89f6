// ops - what the backend has been asked to do and has not launched yet.
//
// Operations of model/backend.h are recorded as plain values and launched together (executor.cpp):
// neighbours that one kernel can do at once are seen, and a list that equals the one before is
// replayed as a CUDA graph. Everything that changes from one token to the next therefore stays out
// of the values: the position and the token ids, which kernels read from StepInput on the device.
#pragma once

#include <cstdint>

#include "cuda/weights.h"

namespace tq::cuda {

enum class OpKind : int32_t {
  kEmbed,
  kRmsNorm,
  kLinears,
  kRope,
  kAttention,
  kSiluMul,
  kAdd,
  kScaleColumns,
  kTransform,
  kCopyRows,
  kTop
};

constexpr int kMaxLinears = 4;

/// One recorded operation. Compared byte by byte: no padding, unused fields are zero.
struct Op {
  OpKind kind;
  int32_t n_linears;  // linears
  // rms_norm, linears (in_dim), silu_mul, add (cols = count), scale_columns, copy_rows, top
  // (cols = n)
  int64_t rows, cols;
  const float* x;                                // first input: x, q, src
  const float* y;                                // second input: gain, up, y, k, factors
  const float* z;                                // third: v
  float* out;                                    // out, in place where the operation is
  const void* object;                            // table, transform, cache, rope angles
  int64_t n_heads, n_kv_heads, head_dim, layer;  // rope, attention
  float eps;
  int32_t inverse;  // transform
  const CudaLinear* linears[kMaxLinears];
  float* outs[kMaxLinears];
};

/// In device memory, before anything of a list runs: what changes from step to step.
struct StepInput {
  int32_t pos0;       // position of row 0
  int32_t n_keys;     // pos0 + rows of the step
  int32_t tokens[1];  // [rows], as many as fit the buffer
};

}  // namespace tq::cuda
