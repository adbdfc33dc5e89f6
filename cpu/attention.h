// attention - causal attention over the key/value cache.
//
// Keys are looked at in blocks of 64 from position 0 and in spans of 512; a span is an online
// softmax over its blocks in ascending order, and spans are merged in ascending order. What a query
// computes therefore depends on its own position only: not on how a text is cut in chunks, nor on
// the threads. Read next: kv_cache.h (how they are stored), attention.cpp (the plain kernel).
#pragma once

#include <span>

#include "cpu/kernels.h"
#include "cpu/kv_cache.h"

namespace tq {

constexpr int64_t kTileQueries = 48;  // of one span job: 12 KB of results at head_dim 64

/// Floats of scratch that a span job needs.
int64_t span_scratch_floats(int64_t head_dim, int64_t padded_dim, int64_t n_queries);

/// One call of Backend::attention: stores k and v, then attends.
struct AttentionCall {
  const float *q, *k, *v;  // [rows, n_heads * head_dim], [rows, n_kv_heads * head_dim]
  float* out;              // [rows, n_heads * head_dim]
  int64_t n_heads, n_kv_heads, head_dim;
  int64_t layer, pos0, rows;
};
/// Uses `n_threads` threads; `scratch` is kept between calls.
void attend(const Kernels& kernels, CpuKvCache& cache, const AttentionCall& call, int n_threads,
            AlignedBuffer& scratch);

void plain_span(const SpanJob& job);
void plain_merge(float* max, float* sum, float* out, float span_max, float span_sum,
                 const float* span_out, int64_t count);

}  // namespace tq
