// kv_cache - keys and values of one timeline on the GPU.
//
// [layer][keys, values][kv head][position][head_dim], in f32, f16, or codes of 8 or 4 bits with a
// scale and a minimum (f16) for each vector (docs/format.md, "KV cache"). Rounding: heads.cu.
#pragma once

#include "cuda/kernels.h"
#include "cuda/queue.h"

namespace tq::cuda {

class CudaKvCache : public KvCache {
 public:
  /// Throws kUsage for other bits than 32, 16, 8, 4; kResource naming need, free memory and the
  /// longest context that fits.
  CudaKvCache(const Config& config, int64_t ctx, int kv_bits, std::shared_ptr<Queue> queue);
  static int64_t n_bytes(const Config& config, int64_t ctx, int kv_bits);
  CacheView view(int64_t layer) const;
  int64_t n_layers() const { return n_layers_; }

 private:
  int64_t n_layers_;
  CacheView shape_ = {};
  DeviceMemory memory_, scales_;
  Lifetime lifetime_;
};

}  // namespace tq::cuda
