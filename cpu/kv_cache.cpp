// kv_cache - layouts, rounding and element access. See kv_cache.h.
//
// Blocks    keys [head_dim, 64], values [64, padded_dim] in f32, f16 or bytes. In 4 bits a byte of
//           the keys holds coordinates 2i (low nibble) and 2i + 1 of one position, a byte of the
//           values columns 2i and 2i + 1: no byte belongs to two tokens, so threads may store
//           tokens side by side.
// Scales    f16 [4, 64]: scale and minimum of the keys, scale and minimum of the values
// Error     |x - value| <= scale / 2 + 2^-11 (|min x| + max x - min x) + 2^(bits - 25), the last
// two
//           terms from the f16 of minimum and scale (tests/test_cpu_attention.cpp)
// Source    KIVI (Liu et al. 2024) and KVQuant (Hooper et al. 2024) for asymmetric codes, QuaRot
//           (Ashkboos et al. 2024) for the rotation of keys
#include "cpu/kv_cache.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "cpu/exp_constants.h"
#include "model/error.h"

namespace tq {
namespace {

constexpr uint16_t kHalfNan = 0x7E00;

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

void check_kv_bits(int kv_bits) {
  if (kv_bits == 32 || kv_bits == 16 || kv_bits == 8 || kv_bits == 4) return;
  throw Error(ErrorKind::kUsage, "KV cache width not supported", "--kv-bits",
              std::to_string(kv_bits) + " on the CPU", "use 32, 16, 8 or 4");
}

float load_half(const std::byte* data, int64_t index) {
  uint16_t bits;
  std::memcpy(&bits, data + 2 * index, 2);
  return f16_to_f32(bits);
}

float load_float(const std::byte* data, int64_t index) {
  float value;
  std::memcpy(&value, data + 4 * index, 4);
  return value;
}

// Code `index` of a stretch, or the nibble `high` of byte `index`.
int load_code(const std::byte* data, int64_t index, int bits, bool high) {
  const int byte = static_cast<int>(data[index]);
  return bits == 8 ? byte : high ? byte >> 4 : byte & 15;
}

}  // namespace

CpuKvCache::Sizes::Sizes(const Config& config, int kv_bits)
    : padded_dim(round_up(config.head_dim, kLanes)),
      keys(kKeyBlock * ((config.head_dim * kv_bits + 7) / 8)),
      values(kKeyBlock * padded_dim * kv_bits / 8),
      scales(kv_bits < 16 ? 4 * kKeyBlock * 2 : 0) {}

int64_t CpuKvCache::n_bytes(const Config& config, int64_t ctx, int kv_bits) {
  check_kv_bits(kv_bits);
  // In double first: a hostile config must not overflow the product.
  const double bytes = static_cast<double>(config.n_layers) *
                       static_cast<double>(config.n_kv_heads) *
                       (static_cast<double>(ctx) + kKeyBlock) *
                       (2.0 * static_cast<double>(config.head_dim) + kLanes) * 4;
  if (!(bytes < 1e17)) return std::numeric_limits<int64_t>::max();
  return config.n_layers * config.n_kv_heads * (round_up(ctx, kKeyBlock) / kKeyBlock) *
         Sizes(config, kv_bits).block();
}

CpuKvCache::CpuKvCache(const Config& config, int64_t ctx, int kv_bits)
    : ctx_(ctx),
      n_blocks_((ctx + kKeyBlock - 1) / kKeyBlock),
      n_kv_heads_(config.n_kv_heads),
      head_dim_(config.head_dim),
      bits_(kv_bits),
      sizes_(config, kv_bits) {
  const int64_t bytes = n_bytes(config, ctx, kv_bits);
  // Linux promises memory that it does not have; the machine's size is the limit that counts.
  const int64_t machine = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
  bool fits = bytes <= machine;
  if (fits) {
    try {
      memory_ = AlignedBuffer(static_cast<size_t>(bytes));
    } catch (const std::bad_alloc&) {
      fits = false;
    }
  }
  if (!fits) {
    throw Error(
        ErrorKind::kResource, "not enough memory for the KV cache",
        "context of " + std::to_string(ctx) + " tokens",
        "needs " + std::to_string(bytes) + " bytes, the machine has " + std::to_string(machine),
        "use a smaller --ctx or --kv-bits");
  }
}

std::byte* CpuKvCache::head(int64_t layer, int64_t kv_head) {
  return memory_.as<std::byte>() + (layer * n_kv_heads_ + kv_head) * n_blocks_ * sizes_.block();
}

void CpuKvCache::show(int64_t layer, int64_t kv_head, SpanJob& job) {
  job.bits = bits_;
  job.keys = head(layer, kv_head);
  job.values = job.keys + n_blocks_ * sizes_.keys;
  job.scales = reinterpret_cast<const uint16_t*>(job.values + n_blocks_ * sizes_.values);
}

void CpuKvCache::store(const Kernels& kernels, int64_t layer, int64_t kv_head, int64_t pos,
                       const float* k, const float* v) {
  std::byte* keys = head(layer, kv_head);
  if (bits_ < 16) return store_codes(pos, k, v, keys);
  std::byte* values = keys + n_blocks_ * sizes_.keys;
  const int64_t key = pos / kKeyBlock * kKeyBlock * head_dim_ + pos % kKeyBlock;
  const int64_t value = pos * sizes_.padded_dim;
  if (bits_ == 16) {
    uint16_t* keys_at = reinterpret_cast<uint16_t*>(keys) + key;
    uint16_t narrow[kKeyBlock];
    for (int64_t i = 0; i < head_dim_; i += kKeyBlock) {
      const int64_t count = std::min(kKeyBlock, head_dim_ - i);
      kernels.store_half(k + i, narrow, count);
      for (int64_t j = 0; j < count; ++j) keys_at[(i + j) * kKeyBlock] = narrow[j];
    }
    kernels.store_half(v, reinterpret_cast<uint16_t*>(values) + value, head_dim_);
    return;
  }
  float* keys_at = reinterpret_cast<float*>(keys) + key;
  for (int64_t i = 0; i < head_dim_; ++i) keys_at[i * kKeyBlock] = k[i];
  std::memcpy(reinterpret_cast<float*>(values) + value, v, static_cast<size_t>(head_dim_) * 4);
}

void CpuKvCache::store_codes(int64_t pos, const float* k, const float* v, std::byte* head) {
  const int64_t block = pos / kKeyBlock, lane = pos % kKeyBlock;
  uint8_t* keys = reinterpret_cast<uint8_t*>(head + block * sizes_.keys) + lane;
  std::byte* all_values = head + n_blocks_ * sizes_.keys;
  uint8_t* values = reinterpret_cast<uint8_t*>(all_values) + pos * sizes_.padded_dim * bits_ / 8;
  uint16_t* scales = reinterpret_cast<uint16_t*>(all_values + n_blocks_ * sizes_.values) +
                     block * 4 * kKeyBlock + lane;
  std::vector<uint8_t> codes(static_cast<size_t>(head_dim_) + 1);  // an odd last one has a partner
  const auto encode = [&](const float* x, int64_t stride, uint8_t* to, uint16_t* scale) {
    const VectorCodes by = encode_vector(x, head_dim_, bits_, codes.data());
    scale[0] = by.scale;
    scale[kKeyBlock] = by.minimum;
    const uint8_t* from = codes.data();
    for (int64_t i = 0; i < head_dim_; i += 8 / bits_, to += stride) {
      *to = bits_ == 8 ? from[i] : static_cast<uint8_t>(from[i] | from[i + 1] << 4);
    }
  };
  encode(k, kKeyBlock, keys, scales);
  encode(v, 1, values, scales + 2 * kKeyBlock);
}

VectorCodes encode_vector(const float* x, int64_t count, int bits, uint8_t* codes) {
  float low = x[0], high = x[0];
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    finite = finite && std::isfinite(x[i]);
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
  }
  if (!finite) {  // must be seen in the output, not rounded away
    std::fill_n(codes, count, uint8_t{0});
    return {0, kHalfNan};
  }
  const float top = static_cast<float>((1 << bits) - 1);
  VectorCodes result;
  result.minimum = f32_to_f16(low);
  const float minimum = f16_to_f32(result.minimum);
  // The minimum may have been rounded up past all of x.
  result.scale = f32_to_f16(std::max(high - minimum, 0.0f) / top);
  const float scale = f16_to_f32(result.scale);
  const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = (x[i] - minimum) * inverse;
    const float bounded = scaled > 0 ? std::min(scaled, top) : 0.0f;  // also the answer for NaN
    codes[i] = static_cast<uint8_t>((bounded + kRoundMagic) - kRoundMagic);
  }
  return result;
}

float cached_key(const SpanJob& job, int64_t key, int64_t i) {
  const int64_t block = key / kKeyBlock, lane = key % kKeyBlock;
  if (job.bits >= 16) {
    const int64_t at = (block * job.head_dim + i) * kKeyBlock + lane;
    return job.bits == 16 ? load_half(job.keys, at) : load_float(job.keys, at);
  }
  const int64_t rows = (job.head_dim * job.bits + 7) / 8;
  const int64_t at = (block * rows + i * job.bits / 8) * kKeyBlock + lane;
  const uint16_t* scales = job.scales + block * 4 * kKeyBlock + lane;
  const float code = static_cast<float>(load_code(job.keys, at, job.bits, i % 2));
  return std::fma(code, f16_to_f32(scales[0]), f16_to_f32(scales[kKeyBlock]));
}

float cached_value(const SpanJob& job, int64_t key, int64_t i) {
  const int64_t at = key * job.padded_dim + i;
  if (job.bits >= 16) {
    return job.bits == 16 ? load_half(job.values, at) : load_float(job.values, at);
  }
  const uint16_t* scales = job.scales + (key / kKeyBlock * 4 + 2) * kKeyBlock + key % kKeyBlock;
  const float code = static_cast<float>(load_code(job.values, at * job.bits / 8, job.bits, i % 2));
  return std::fma(code, f16_to_f32(scales[0]), f16_to_f32(scales[kKeyBlock]));
}

}  // namespace tq
