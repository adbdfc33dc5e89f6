// attention - the key/value cache of the CPU and causal attention over it.
//
// Keys are looked at in blocks of 64 from position 0 and in spans of 512; a span is an online
// softmax over its blocks in ascending order, and spans are merged in ascending order. What a query
// computes therefore depends on its own position only: not on how a text is cut in chunks, nor on
// the threads. Keys of a block are stored transposed ([head_dim, 64]), so that both products run
// along contiguous lanes with no sum across lanes. Read next: attention.cpp (the plain kernel).
#pragma once

#include <span>

#include "cpu/kernels.h"
#include "model/backend.h"
#include "model/tensor.h"

namespace tq {

constexpr int64_t kTileQueries = 48;  // of one span job: 12 KB of results at head_dim 64

class CpuKvCache : public KvCache {
 public:
  /// Throws kUsage for kv_bits other than 32 and 16, kResource if the memory is not there.
  CpuKvCache(const Config& config, int64_t ctx, int kv_bits);
  static int64_t n_bytes(const Config& config, int64_t ctx, int kv_bits);

  int64_t ctx() const { return ctx_; }
  bool half() const { return half_; }
  int64_t padded_dim() const { return padded_dim_; }
  std::byte* keys(int64_t layer, int64_t kv_head);
  std::byte* values(int64_t layer, int64_t kv_head);
  /// Writes one head of one token, k and v [head_dim].
  void store(const Kernels& kernels, int64_t layer, int64_t kv_head, int64_t pos, const float* k,
             const float* v);

 private:
  int64_t ctx_, n_blocks_, n_kv_heads_, head_dim_, padded_dim_;
  bool half_;
  AlignedBuffer memory_;  // [layer, kv_head] of keys [block, head_dim, 64], values [block, 64, pad]
};

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
