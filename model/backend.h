// backend - the only bridge between the forward pass and a device.
//
// About a dozen operations on opaque f32 device buffers. model/forward.cpp calls them; cpu/ and
// cuda/ implement them. All shapes are [rows, cols] row-major, f32, on the device. Operations are
// ordered; a backend may run them asynchronously until download() or end_step().
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/sampler.h"
#include "model/weights.h"

namespace tq {

/// Device memory, f32. Owned by the caller, meaningful to its backend only.
class DeviceBuffer {
 public:
  virtual ~DeviceBuffer() = default;
};
using BufferPtr = std::unique_ptr<DeviceBuffer>;

/// A weight in the layout that the backend wants. Must not outlive the Model it was made from.
class PreparedLinear {
 public:
  virtual ~PreparedLinear() = default;
};
class PreparedTable {  // the token embedding
 public:
  virtual ~PreparedTable() = default;
};
class PreparedTransform {
 public:
  virtual ~PreparedTransform() = default;
};

/// Keys and values of one timeline, all layers; keys are stored after RoPE.
class KvCache {
 public:
  virtual ~KvCache() = default;
};

struct RopeTable {
  std::vector<float> inv_freq;    // [head_dim / 2], radians per position
  float attention_factor = 1.0f;  // multiplies cos and sin
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;
  /// Tokens of a prefill step that suit this device: a large one needs more to be busy.
  virtual int64_t step_rows() const { return 512; }

  virtual BufferPtr alloc(int64_t n_floats) = 0;
  virtual void upload(DeviceBuffer& dst, std::span<const float> src) = 0;
  /// Copies `out.size()` floats from element `offset` on; waits for all earlier operations.
  virtual void download(const DeviceBuffer& src, int64_t offset, std::span<float> out) = 0;

  /// The `count` (0: all) largest of the first n floats, as top_candidates() orders them; waits.
  virtual void top(const DeviceBuffer& src, int64_t n, int64_t count,
                   std::vector<Candidate>& out) = 0;

  /// Moves or repacks weights for this device, once, at load.
  virtual std::unique_ptr<PreparedLinear> prepare(const Linear& linear) = 0;
  virtual std::unique_ptr<PreparedTable> prepare_table(const Matrix& table) = 0;
  virtual std::unique_ptr<PreparedTransform> prepare_transform(const Transform& transform) = 0;
  /// kv_bits: 32, 16, 8 or 4 bits per value. Below 16 a head of a token is rounded to codes with a
  /// scale and a minimum (docs/format.md, "KV cache"); forward.cpp rotates q and k before.
  virtual std::unique_ptr<KvCache> make_kv_cache(const Config& config, int64_t ctx,
                                                 int kv_bits) = 0;
  virtual int64_t kv_bytes(const Config& config, int64_t ctx, int kv_bits) const = 0;
  /// Memory that operations on `rows` tokens take beside their buffers, about.
  virtual double scratch_bytes(const Config& config, int64_t rows) const {
    return static_cast<void>(config), static_cast<void>(rows), 0;
  }
  /// Memory that can still be had, so that a session is refused before it allocates; a backend
  /// whose alloc() fails when there is none may leave it at this.
  virtual uint64_t available_bytes() const { return UINT64_MAX; }

  /// x[i, :] = table[tokens[i], :]
  virtual void embed(const PreparedTable& table, std::span<const int32_t> tokens,
                     DeviceBuffer& x) = 0;
  /// out[i, :] = x[i, :] / sqrt(mean(x[i, :]^2) + eps) * gain; x and out may be the same buffer.
  /// Used for the residual stream (cols = dim) and per head for Qwen3 (cols = head_dim).
  virtual void rms_norm(const DeviceBuffer& x, const DeviceBuffer& gain, float eps, int64_t rows,
                        int64_t cols, DeviceBuffer& out) = 0;
  /// Linears that read the same x: out[j] = linear_j(x). They share in_dim and input transform, so
  /// x is transformed once, and rounded once for each distinct act (a linear kept in 16 bits beside
  /// rounded ones has act.bits = 16).
  virtual void linears(std::span<const PreparedLinear* const> weights, const DeviceBuffer& x,
                       int64_t rows, std::span<DeviceBuffer* const> out) = 0;
  /// Rotates pairs (i, i + head_dim/2) of every head in place; row r is at position pos0 + r.
  virtual void rope(DeviceBuffer& x, int64_t rows, int64_t n_heads, int64_t head_dim, int64_t pos0,
                    const RopeTable& table) = 0;
  /// Stores k and v of `rows` tokens at pos0.. in the cache of `layer`, then causal attention of q
  /// over positions 0..pos: out[rows, n_heads * head_dim]. GQA: n_heads / n_kv_heads queries share
  /// a key head. Scale 1 / sqrt(head_dim).
  virtual void attention(const DeviceBuffer& q, const DeviceBuffer& k, const DeviceBuffer& v,
                         const Config& config, KvCache& cache, int64_t layer, int64_t pos0,
                         int64_t rows, DeviceBuffer& out) = 0;
  /// gate[i] = silu(gate[i]) * up[i]
  virtual void silu_mul(DeviceBuffer& gate, const DeviceBuffer& up, int64_t count) = 0;
  /// x[i] += y[i]
  virtual void add(DeviceBuffer& x, const DeviceBuffer& y, int64_t count) = 0;
  /// x[i, j] *= factors[j], in place. Only for models whose numbers would leave f16's range.
  virtual void scale_columns(DeviceBuffer& x, int64_t rows, int64_t cols,
                             const DeviceBuffer& factors) = 0;
  /// x <- transform(x), or its inverse, row by row, in place.
  virtual void transform(DeviceBuffer& x, int64_t rows, const PreparedTransform& basis,
                         bool inverse) = 0;
  /// dst[0..rows, :] = src[first_row.., :]
  virtual void copy_rows(const DeviceBuffer& src, int64_t first_row, int64_t rows, int64_t cols,
                         DeviceBuffer& dst) = 0;

  /// Brackets one forward step (graph capture on a GPU; nothing on a CPU).
  virtual void begin_step(int64_t rows) { (void)rows; }
  virtual void end_step() {}
  /// Waits for all operations, so that a clock means something.
  virtual void synchronize() {}
};

}  // namespace tq
