// forward - the forward pass of Llama-3 and Qwen3, written once, over model/backend.h.
//
// Ownership: Model (host, immutable) -> PreparedModel (device weights, immutable) -> Session (one
// mutable timeline: KV cache, activations). The layer step is a free function because calibration
// (quant/) runs single layers too. Read forward_layer() in forward.cpp first.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "model/backend.h"
#include "model/weights.h"

namespace tq {

/// A LowRankStep on a device; null without one.
struct PreparedSkip {
  std::unique_ptr<PreparedLinear> a, b;
};

/// One decoder layer on a device.
struct PreparedLayer {
  BufferPtr attn_norm, ffn_norm;  // [dim]
  BufferPtr q_norm, k_norm;       // [head_dim] or null
  std::unique_ptr<PreparedLinear> wq, wk, wv, wo, w_gate, w_up, w_down;
  PreparedSkip attn_skip, ffn_skip;
  /// Powers of two that the outputs of the linears (in the order of kLayerLinears) and of attention
  /// are multiplied by, where numbers would leave f16's range; null: none, as in ordinary models.
  BufferPtr factors[7], attn_factors;
};
PreparedLayer prepare_layer(Backend& backend, const Config& config, const Layer& layer);

/// Scratch activations for up to `max_rows` tokens, f32.
struct Activations {
  Activations(Backend& backend, const Config& config, int64_t max_rows);
  int64_t max_rows;
  BufferPtr x;            // [max_rows, dim] residual stream
  BufferPtr x_norm;       // [max_rows, dim]
  BufferPtr q, attn_out;  // [max_rows, q_dim]
  BufferPtr k, v;         // [max_rows, kv_dim]
  BufferPtr gate, up;     // [max_rows, hidden_dim]
  BufferPtr proj;         // [max_rows, dim] output of wo and w_down
  BufferPtr skip;         // [max_rows, rank <= dim] inside a low-rank step
};

/// The four places where a layer's linears read: each feeds linears that share one input.
enum class Site { kAttnIn, kAttnOut, kFfnIn, kFfnMid };
/// Called with the input of each site, before the linears' own transform and rounding.
using LayerTap = std::function<void(Site site, const DeviceBuffer& x, int64_t rows, int64_t cols)>;

/// Bytes that the keys and values of one token take, all layers, without a backend's padding.
int64_t kv_token_bytes(const Config& config, int kv_bits);

/// acts.x <- layer(acts.x) for `rows` tokens at positions pos0.. ; appends to the cache's `layer`.
/// key_basis: applied to every head of q and k after RoPE; it cancels in their product.
void forward_layer(Backend& backend, const Config& config, const PreparedLayer& layer,
                   const RopeTable& rope, KvCache& cache, int64_t layer_index, int64_t pos0,
                   int64_t rows, Activations& acts, const LayerTap& tap = nullptr,
                   const PreparedTransform* key_basis = nullptr);

/// Whether a PreparedModel has all its layers on the device, or makes each when it is its turn and
/// drops it after: slow, for a few tokens of a model that need not fit.
enum class LayerResidence { kAll, kOneAtATime };

class PreparedModel {
 public:
  /// Both must outlive this object.
  PreparedModel(const Model& model, Backend& backend,
                LayerResidence residence = LayerResidence::kAll);
  const Model& model() const { return model_; }
  const Config& config() const { return model_.config; }
  Backend& backend() const { return backend_; }

 private:
  friend class Session;
  const Model& model_;
  Backend& backend_;
  std::unique_ptr<PreparedTable> tok_embed_;
  std::unique_ptr<PreparedTransform> residual_basis_, output_basis_;  // null when inactive
  std::unique_ptr<PreparedTransform> key_basis_;  // of one head, for a cache of codes
  BufferPtr final_norm_;
  std::vector<PreparedLayer> layers_;  // empty if they are made one at a time
  std::unique_ptr<PreparedLinear> lm_head_;
  RopeTable rope_;
};

struct SessionOptions {
  int64_t ctx = 2048;       // longest timeline, tokens
  int kv_bits = 16;         // 32, 16, 8 or 4
  int64_t valid_vocab = 0;  // logits of ids from here on are -inf (padding rows); 0 = all valid
  int64_t chunk = 512;      // tokens per prefill step; does not change results
  // Called before each layer of a step; what it throws ends the call, and the tokens of the step
  // are not part of the timeline.
  std::function<void()> stop;
};

/// Device memory that a session takes: activations, KV cache, scratch. Bytes, about.
double session_bytes(const Backend& backend, const Config& config, const SessionOptions& options);

/// One timeline. Not thread-safe.
class Session {
 public:
  /// Throws kResource, before anything is allocated, if the device has not enough memory.
  Session(const PreparedModel& model, const SessionOptions& options);

  /// Appends tokens and returns the logits after the last one, [vocab_size], valid until the next
  /// call. Throws kBadData if an id is out of range, the timeline would exceed ctx, or a logit is
  /// NaN or infinite: then the message names the first layer behind which a number is. After that
  /// error the session is of no use.
  std::span<const float> feed(std::span<const int32_t> tokens);
  /// The same, but only the `count` (0: all) largest, as top_candidates() orders them: all that
  /// sampling needs, and little to bring from a device. Ids from valid_vocab on are no candidates.
  std::span<const Candidate> feed_top(std::span<const int32_t> tokens, int64_t count);
  /// Appends tokens; calls `sink(first, rows, logits)` for consecutive blocks of them in order:
  /// logits [rows, vocab_size] belong to tokens[first], tokens[first + 1], ...
  using LogitsSink =
      std::function<void(int64_t first, int64_t rows, std::span<const float> logits)>;
  void feed_all(std::span<const int32_t> tokens, const LogitsSink& sink);
  /// Forgets everything after the first `n_tokens`.
  void truncate(int64_t n_tokens);
  int64_t position() const { return static_cast<int64_t>(timeline_.size()); }
  int64_t ctx() const { return options_.ctx; }

 private:
  int64_t run_chunks(std::span<const int32_t> tokens);
  /// behind(layer): called after each layer, -1 after the embedding.
  void run_chunk(std::span<const int32_t> tokens,
                 const std::function<void(int64_t layer)>& behind = nullptr);
  [[noreturn]] void refuse_not_finite();
  void run_head(int64_t first_row, int64_t rows);
  std::span<const float> compute_logits(int64_t first_row, int64_t rows);
  void check_fits(std::span<const int32_t> tokens) const;
  int64_t n_valid() const;  // logits that belong to tokens

  const PreparedModel& model_;
  SessionOptions options_;
  std::vector<int32_t> timeline_;  // the tokens whose keys and values the cache holds
  Activations acts_;
  std::unique_ptr<KvCache> cache_;
  BufferPtr head_in_;          // [kLogitRows, dim]
  BufferPtr logits_device_;    // [kLogitRows, vocab_size]
  std::vector<float> logits_;  // [kLogitRows, vocab_size]
  std::vector<Candidate> candidates_;
};

}  // namespace tq
