// kv_cache - keys and values of one timeline on the CPU, in 32, 16, 8 or 4 bits.
//
// Keys of a block of 64 positions are stored transposed ([head_dim, 64]), so that both products of
// attention run along contiguous lanes with no sum across lanes. In 8 and 4 bits each head of each
// token has a scale and a minimum of its own, for its key and for its value (docs/format.md, "KV
// cache"). Not here: the rotation of q and k that goes before (model/forward.cpp), attention
// (attention.h). Read next: kv_cache.cpp.
#pragma once

#include "cpu/kernels.h"
#include "model/backend.h"
#include "model/tensor.h"

namespace tq {

class CpuKvCache : public KvCache {
 public:
  /// Throws kUsage for kv_bits other than 32, 16, 8 and 4, kResource if the memory is not there.
  CpuKvCache(const Config& config, int64_t ctx, int kv_bits);
  static int64_t n_bytes(const Config& config, int64_t ctx, int kv_bits);

  int64_t ctx() const { return ctx_; }
  int64_t padded_dim() const { return sizes_.padded_dim; }
  /// Points a job at one head: keys, values, scales and bits.
  void show(int64_t layer, int64_t kv_head, SpanJob& job);
  /// Writes one head of one token, k and v [head_dim].
  void store(const Kernels& kernels, int64_t layer, int64_t kv_head, int64_t pos, const float* k,
             const float* v);

 private:
  // Bytes of a block of one head.
  struct Sizes {
    Sizes(const Config& config, int kv_bits);
    int64_t padded_dim, keys, values, scales;
    int64_t block() const { return keys + values + scales; }
  };
  // Of one head: all blocks of keys, then of values, then of scales.
  std::byte* head(int64_t layer, int64_t kv_head);
  void store_codes(int64_t pos, const float* k, const float* v, std::byte* head);

  int64_t ctx_, n_blocks_, n_kv_heads_, head_dim_;
  int bits_;
  Sizes sizes_;
  AlignedBuffer memory_;  // [layer, kv_head] of heads
};

/// Scale and minimum of a vector x [count] as f16, and its codes 0 .. 2^bits - 1.
struct VectorCodes {
  uint16_t scale, minimum;
};
VectorCodes encode_vector(const float* x, int64_t count, int bits, uint8_t* codes);

/// One element of a job's cache as the kernels read it; `key` is a position.
float cached_key(const SpanJob& job, int64_t key, int64_t i);
float cached_value(const SpanJob& job, int64_t key, int64_t i);

}  // namespace tq
