// kv_cache - see kv_cache.h.
#include "cuda/kv_cache.h"

#include <limits>

#include "model/error.h"

namespace tq::cuda {
namespace {

int64_t vector_bytes(const Config& config, int kv_bits) {
  return (config.head_dim * kv_bits + 7) / 8;
}

void check_kv_bits(int kv_bits) {
  if (kv_bits == 32 || kv_bits == 16 || kv_bits == 8 || kv_bits == 4) return;
  throw Error(ErrorKind::kUsage, "KV cache width not supported", "--kv-bits",
              std::to_string(kv_bits) + " on the GPU", "use 32, 16, 8 or 4");
}

}  // namespace

int64_t CudaKvCache::n_bytes(const Config& config, int64_t ctx, int kv_bits) {
  check_kv_bits(kv_bits);
  // In double first: a hostile config must not overflow the product.
  const double vectors = 2.0 * static_cast<double>(config.n_layers) *
                         static_cast<double>(config.n_kv_heads) * static_cast<double>(ctx);
  const int64_t bytes = vector_bytes(config, kv_bits) + (kv_bits < 16 ? 4 : 0);
  if (!(vectors * static_cast<double>(bytes) < 1e17)) return std::numeric_limits<int64_t>::max();
  return 2 * config.n_layers * config.n_kv_heads * ctx * bytes;
}

CudaKvCache::CudaKvCache(const Config& config, int64_t ctx, int kv_bits,
                         std::shared_ptr<Queue> queue)
    : n_layers_(config.n_layers), lifetime_(std::move(queue)) {
  const int64_t need = n_bytes(config, ctx, kv_bits), free = free_bytes();
  if (need > free) {
    const int64_t fits = free / n_bytes(config, 1, kv_bits);
    throw Error(ErrorKind::kResource, "not enough GPU memory for the KV cache",
                "context of " + std::to_string(ctx) + " tokens",
                "needs " + std::to_string(need >> 20) + " MiB, " + std::to_string(free >> 20) +
                    " MiB are free, enough for " + std::to_string(fits) + " tokens",
                "use a smaller --ctx or --kv-bits");
  }
  shape_.bits = kv_bits;
  shape_.ctx = ctx;
  shape_.n_kv_heads = config.n_kv_heads;
  shape_.head_dim = config.head_dim;
  shape_.vector_bytes = vector_bytes(config, kv_bits);
  const int64_t vectors = 2 * n_layers_ * config.n_kv_heads * ctx;
  memory_ = DeviceMemory(vectors * shape_.vector_bytes, "KV cache");
  if (kv_bits < 16) scales_ = DeviceMemory(vectors * 4, "KV cache");
}

CacheView CudaKvCache::view(int64_t layer) const {
  TQ_CHECK(layer >= 0 && layer < n_layers_);
  CacheView view = shape_;
  const int64_t vectors = shape_.n_kv_heads * shape_.ctx;
  view.keys = memory_.as<uint8_t>() + 2 * layer * vectors * shape_.vector_bytes;
  view.values = view.keys + vectors * shape_.vector_bytes;
  if (shape_.bits < 16) {
    view.key_scales = scales_.as<__half2>() + 2 * layer * vectors;
    view.value_scales = view.key_scales + vectors;
  }
  return view;
}

}  // namespace tq::cuda
