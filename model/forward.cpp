// forward - the forward pass. Read forward_layer() first: it is the whole architecture.
//
// Not here: arithmetic (a Backend), quantization (the weights know), sampling (model/sampler.h).
// Read next: cpu/cpu_backend.cpp, the plainest implementation of every operation used below.
#include "model/forward.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "model/error.h"
#include "model/hadamard.h"
#include "model/kv_range.h"
#include "model/memory.h"

namespace tq {
namespace {

// Logits are the widest activation (vocab_size floats a token: 600 KB for Qwen3), so a prefill step
// computes them in blocks of this many rows.
constexpr int64_t kLogitRows = 64;

BufferPtr upload_vector(Backend& backend, const std::vector<float>& values) {
  if (values.empty()) return nullptr;
  BufferPtr buffer = backend.alloc(static_cast<int64_t>(values.size()));
  backend.upload(*buffer, values);
  return buffer;
}

void run_linears(Backend& backend, std::initializer_list<const PreparedLinear*> weights,
                 const DeviceBuffer& x, int64_t rows, std::initializer_list<DeviceBuffer*> out) {
  backend.linears({weights.begin(), weights.size()}, x, rows, {out.begin(), out.size()});
}

// x <- x diag(factors), if there are any.
void multiply(Backend& backend, const BufferPtr& factors, DeviceBuffer& x, int64_t rows,
              int64_t cols) {
  if (factors) backend.scale_columns(x, rows, cols, *factors);
}

PreparedSkip prepare_skip(Backend& backend, const std::optional<LowRankStep>& skip) {
  PreparedSkip prepared;
  if (!skip) return prepared;
  Linear linear;  // nothing is rounded
  linear.weight = skip->a;
  prepared.a = backend.prepare(linear);
  linear.weight = skip->b;
  prepared.b = backend.prepare(linear);
  return prepared;
}

// 2^(exponents + more); null if there are none. `exponents`: [size] or null, `more`: [size] or
// empty.
BufferPtr upload_factors(Backend& backend, const int8_t* exponents, const std::vector<int>& more,
                         int64_t size) {
  if (!exponents && more.empty()) return nullptr;
  std::vector<float> factors(static_cast<size_t>(size));
  for (size_t i = 0; i < factors.size(); ++i) {
    const int sum = (exponents ? exponents[i] : 0) + (more.empty() ? 0 : more[i]);
    factors[i] = std::ldexp(1.0f, std::clamp(sum, kMinExponent, kMaxExponent));
  }
  return upload_vector(backend, factors);
}

void prepare_factors(Backend& backend, const Layer& layer, const KvExponents& kv,
                     PreparedLayer& prepared) {
  // A norm behind wq and wk would undo what is done before it: its gain takes the power of two.
  const bool normed = !layer.q_norm.empty();
  const auto gain = [&](std::vector<float> values, const std::vector<int>& exponents) {
    for (float& value : values) value = exponents.empty() ? value : std::ldexp(value, exponents[0]);
    return upload_vector(backend, values);
  };
  prepared.q_norm = gain(layer.q_norm, kv.q);
  prepared.k_norm = gain(layer.k_norm, kv.k);
  const std::vector<int> none;
  for (size_t i = 0; i < std::size(kLayerLinears); ++i) {
    const Linear& linear = layer.*kLayerLinears[i].member;
    const std::vector<int>& more = i == 0 && !normed   ? kv.q
                                   : i == 1 && !normed ? kv.k
                                   : i == 2            ? kv.v
                                                       : none;
    prepared.factors[i] = upload_factors(backend, linear.exponents, more, linear.out_dim());
  }
  prepared.attn_factors = upload_factors(backend, nullptr, kv.out, layer.wo.in_dim());
}

bool all_finite(std::span<const float> values) {
  constexpr uint32_t kExponent = 0x7F800000;
  bool finite = true;
  for (float value : values) finite &= (std::bit_cast<uint32_t>(value) & kExponent) != kExponent;
  return finite;
}

// x <- x + (x A^T) B^T. x_norm is free: the linears that read it have run.
void run_skip(Backend& backend, const PreparedSkip& skip, int64_t rows, int64_t dim,
              Activations& acts) {
  if (!skip.a) return;
  run_linears(backend, {skip.a.get()}, *acts.x, rows, {acts.skip.get()});
  run_linears(backend, {skip.b.get()}, *acts.skip, rows, {acts.x_norm.get()});
  backend.add(*acts.x, *acts.x_norm, rows * dim);
}

}  // namespace

PreparedLayer prepare_layer(Backend& backend, const Config& config, const Layer& layer) {
  PreparedLayer prepared;
  prepared.attn_norm = upload_vector(backend, layer.attn_norm);
  prepared.ffn_norm = upload_vector(backend, layer.ffn_norm);
  prepare_factors(backend, layer, kv_exponents(config, layer), prepared);
  prepared.wq = backend.prepare(layer.wq);
  prepared.wk = backend.prepare(layer.wk);
  prepared.wv = backend.prepare(layer.wv);
  prepared.wo = backend.prepare(layer.wo);
  prepared.w_gate = backend.prepare(layer.w_gate);
  prepared.w_up = backend.prepare(layer.w_up);
  prepared.w_down = backend.prepare(layer.w_down);
  prepared.attn_skip = prepare_skip(backend, layer.attn_skip);
  prepared.ffn_skip = prepare_skip(backend, layer.ffn_skip);
  return prepared;
}

Activations::Activations(Backend& backend, const Config& config, int64_t rows)
    : max_rows(rows),
      x(backend.alloc(rows * config.dim)),
      x_norm(backend.alloc(rows * config.dim)),
      q(backend.alloc(rows * config.q_dim())),
      attn_out(backend.alloc(rows * config.q_dim())),
      k(backend.alloc(rows * config.kv_dim())),
      v(backend.alloc(rows * config.kv_dim())),
      gate(backend.alloc(rows * config.hidden_dim)),
      up(backend.alloc(rows * config.hidden_dim)),
      proj(backend.alloc(rows * config.dim)),
      skip(backend.alloc(rows * config.dim)) {}

int64_t kv_token_bytes(const Config& config, int kv_bits) {
  // Codes come with a scale and a minimum in f16.
  const int64_t vector = (config.head_dim * kv_bits + 7) / 8 + (kv_bits < 16 ? 4 : 0);
  return config.n_layers * config.n_kv_heads * 2 * vector;
}

void forward_layer(Backend& backend, const Config& config, const PreparedLayer& layer,
                   const RopeTable& rope, KvCache& cache, int64_t layer_index, int64_t pos0,
                   int64_t rows, Activations& acts, const LayerTap& tap,
                   const PreparedTransform* key_basis) {
  // Attention: x += wo(attend(rope(norm(wq x)), rope(norm(wk x)), wv x))
  backend.rms_norm(*acts.x, *layer.attn_norm, config.norm_eps, rows, config.dim, *acts.x_norm);
  if (tap) tap(Site::kAttnIn, *acts.x_norm, rows, config.dim);
  run_linears(backend, {layer.wq.get(), layer.wk.get(), layer.wv.get()}, *acts.x_norm, rows,
              {acts.q.get(), acts.k.get(), acts.v.get()});
  multiply(backend, layer.factors[0], *acts.q, rows, config.q_dim());
  multiply(backend, layer.factors[1], *acts.k, rows, config.kv_dim());
  multiply(backend, layer.factors[2], *acts.v, rows, config.kv_dim());
  if (config.has_qk_norm()) {
    // Qwen3 normalises every head by itself, before the rotation.
    backend.rms_norm(*acts.q, *layer.q_norm, config.norm_eps, rows * config.n_heads,
                     config.head_dim, *acts.q);
    backend.rms_norm(*acts.k, *layer.k_norm, config.norm_eps, rows * config.n_kv_heads,
                     config.head_dim, *acts.k);
  }
  backend.rope(*acts.q, rows, config.n_heads, config.head_dim, pos0, rope);
  backend.rope(*acts.k, rows, config.n_kv_heads, config.head_dim, pos0, rope);
  if (key_basis) {
    backend.transform(*acts.q, rows * config.n_heads, *key_basis, false);
    backend.transform(*acts.k, rows * config.n_kv_heads, *key_basis, false);
  }
  backend.attention(*acts.q, *acts.k, *acts.v, config, cache, layer_index, pos0, rows,
                    *acts.attn_out);
  multiply(backend, layer.attn_factors, *acts.attn_out, rows, config.q_dim());
  if (tap) tap(Site::kAttnOut, *acts.attn_out, rows, config.q_dim());
  run_linears(backend, {layer.wo.get()}, *acts.attn_out, rows, {acts.proj.get()});
  multiply(backend, layer.factors[3], *acts.proj, rows, config.dim);
  run_skip(backend, layer.attn_skip, rows, config.dim, acts);
  backend.add(*acts.x, *acts.proj, rows * config.dim);

  // FFN: x += w_down(silu(w_gate x) * w_up x)
  backend.rms_norm(*acts.x, *layer.ffn_norm, config.norm_eps, rows, config.dim, *acts.x_norm);
  if (tap) tap(Site::kFfnIn, *acts.x_norm, rows, config.dim);
  run_linears(backend, {layer.w_gate.get(), layer.w_up.get()}, *acts.x_norm, rows,
              {acts.gate.get(), acts.up.get()});
  multiply(backend, layer.factors[4], *acts.gate, rows, config.hidden_dim);
  multiply(backend, layer.factors[5], *acts.up, rows, config.hidden_dim);
  backend.silu_mul(*acts.gate, *acts.up, rows * config.hidden_dim);
  if (tap) tap(Site::kFfnMid, *acts.gate, rows, config.hidden_dim);
  run_linears(backend, {layer.w_down.get()}, *acts.gate, rows, {acts.proj.get()});
  multiply(backend, layer.factors[6], *acts.proj, rows, config.dim);
  run_skip(backend, layer.ffn_skip, rows, config.dim, acts);
  backend.add(*acts.x, *acts.proj, rows * config.dim);
}

PreparedModel::PreparedModel(const Model& model, Backend& backend, LayerResidence residence)
    : model_(model),
      backend_(backend),
      tok_embed_(backend.prepare_table(model.tok_embed)),
      final_norm_(upload_vector(backend, model.final_norm)),
      lm_head_(backend.prepare(model.lm_head)) {
  if (model.residual_basis.active()) {
    residual_basis_ = backend.prepare_transform(model.residual_basis);
    output_basis_ = backend.prepare_transform(model.last_basis());
  }
  // Keys have a few loud coordinates, which a scale for a whole head cannot serve (QuaRot).
  Transform key_basis;
  key_basis.kind = Transform::Kind::kHadamard;
  key_basis.size = model.config.head_dim;
  key_basis.block = hadamard_block(model.config.head_dim);
  key_basis_ = backend.prepare_transform(key_basis);
  if (residence == LayerResidence::kAll) {
    layers_.reserve(model.layers.size());
    for (const Layer& layer : model.layers)
      layers_.push_back(prepare_layer(backend, model.config, layer));
  }
  rope_.inv_freq = rope_inv_freq(model.config.rope, model.config.head_dim);
  rope_.attention_factor = static_cast<float>(model.config.rope.attention_factor);
}

double session_bytes(const Backend& backend, const Config& config, const SessionOptions& options) {
  const int64_t rows = std::min(options.chunk, options.ctx);
  const auto floats = [](int64_t n_rows, std::initializer_list<int64_t> widths) {
    double sum = 0;
    for (int64_t width : widths) sum += static_cast<double>(width);
    return 4 * sum * static_cast<double>(n_rows);
  };
  const double activations = floats(
      rows, {4 * config.dim, 2 * config.q_dim(), 2 * config.kv_dim(), 2 * config.hidden_dim});
  const double head = floats(std::min(kLogitRows, rows), {config.dim, 2 * config.vocab_size});
  return activations + head + backend.scratch_bytes(config, rows) +
         static_cast<double>(backend.kv_bytes(config, options.ctx, options.kv_bits));
}

namespace {

const SessionOptions& checked_memory(const PreparedModel& model, const SessionOptions& options) {
  const double needed = session_bytes(model.backend(), model.config(), options);
  const double available = static_cast<double>(model.backend().available_bytes());
  if (needed <= available) return options;
  throw Error(ErrorKind::kResource, "not enough memory",
              "context of " + std::to_string(options.ctx) + " tokens",
              "activations and KV cache need " + gigabytes(needed) + ", " + gigabytes(available) +
                  " are available",
              "use a smaller --ctx or --kv-bits");
}

}  // namespace

Session::Session(const PreparedModel& model, const SessionOptions& options)
    : model_(model),
      options_(checked_memory(model, options)),
      acts_(model.backend(), model.config(), std::min(options.chunk, options.ctx)),
      cache_(model.backend().make_kv_cache(model.config(), options.ctx, options.kv_bits)) {
  const int64_t logit_rows = std::min(kLogitRows, acts_.max_rows);
  const Config& config = model.config();
  head_in_ = model.backend().alloc(logit_rows * config.dim);
  logits_device_ = model.backend().alloc(logit_rows * config.vocab_size);
  logits_.resize(static_cast<size_t>(logit_rows * config.vocab_size));
}

int64_t Session::n_valid() const {
  const int64_t vocab = model_.config().vocab_size;
  return options_.valid_vocab > 0 ? std::min(options_.valid_vocab, vocab) : vocab;
}

void Session::check_fits(std::span<const int32_t> tokens) const {
  const int64_t count = static_cast<int64_t>(tokens.size());
  if (count > options_.ctx - position()) {
    throw Error(ErrorKind::kBadData, "prompt does not fit", model_.model().source,
                std::to_string(position() + count) + " tokens, the context is " +
                    std::to_string(options_.ctx),
                "raise --ctx or shorten the text");
  }
  for (int32_t token : tokens) {
    if (token < 0 || token >= model_.config().vocab_size) {
      throw Error(ErrorKind::kBadData, "token id out of range", model_.model().source,
                  std::to_string(token) + " is not in 0.." +
                      std::to_string(model_.config().vocab_size - 1));
    }
  }
}

void Session::run_chunk(std::span<const int32_t> tokens,
                        const std::function<void(int64_t layer)>& behind) {
  Backend& backend = model_.backend();
  const int64_t rows = static_cast<int64_t>(tokens.size());
  backend.embed(*model_.tok_embed_, tokens, *acts_.x);
  if (model_.residual_basis_) backend.transform(*acts_.x, rows, *model_.residual_basis_, false);
  if (behind) behind(-1);
  const std::vector<PreparedLayer>& all = model_.layers_;
  for (int64_t layer = 0; layer < model_.config().n_layers; ++layer) {
    const size_t index = static_cast<size_t>(layer);
    if (options_.stop) options_.stop();
    PreparedLayer made;
    if (all.empty()) made = prepare_layer(backend, model_.config(), model_.model().layers[index]);
    forward_layer(backend, model_.config(), all.empty() ? made : all[index], model_.rope_, *cache_,
                  layer, position(), rows, acts_, nullptr,
                  options_.kv_bits < 16 ? model_.key_basis_.get() : nullptr);
    if (all.empty()) backend.synchronize();  // before the layer goes
    if (behind) behind(layer);
  }
  timeline_.insert(timeline_.end(), tokens.begin(), tokens.end());
}

// Runs the timeline again, looking at the stream behind every layer: slow, but only for the
// message.
void Session::refuse_not_finite() {
  const std::vector<int32_t> tokens = std::exchange(timeline_, {});
  int64_t first = model_.config().n_layers;  // the head
  std::vector<float> x;
  for (size_t done = 0; done < tokens.size();) {
    const size_t rows = std::min(static_cast<size_t>(acts_.max_rows), tokens.size() - done);
    x.resize(rows * static_cast<size_t>(model_.config().dim));
    run_chunk(std::span(tokens).subspan(done, rows), [&](int64_t layer) {
      if (layer >= first) return;
      model_.backend().download(*acts_.x, 0, x);
      if (!all_finite(x)) first = layer;
    });
    done += rows;
  }
  const std::string place = first < 0                           ? "the embedding"
                            : first == model_.config().n_layers ? "the head"
                                                                : "layer " + std::to_string(first);
  throw Error(ErrorKind::kBadData, "the model's numbers are not finite", model_.model().source,
              "NaN or infinity, first behind " + place +
                  (first >= 0 && first < model_.config().n_layers
                       ? " (of 0.." + std::to_string(model_.config().n_layers - 1) + ")"
                       : ""));
}

// logits_device_ <- the head's outputs for rows of the last chunk.
void Session::run_head(int64_t first_row, int64_t rows) {
  Backend& backend = model_.backend();
  const Config& config = model_.config();
  backend.copy_rows(*acts_.x, first_row, rows, config.dim, *head_in_);
  if (model_.output_basis_) backend.transform(*head_in_, rows, *model_.output_basis_, true);
  backend.rms_norm(*head_in_, *model_.final_norm_, config.norm_eps, rows, config.dim, *head_in_);
  run_linears(backend, {model_.lm_head_.get()}, *head_in_, rows, {logits_device_.get()});
}

std::span<const float> Session::compute_logits(int64_t first_row, int64_t rows) {
  const Config& config = model_.config();
  run_head(first_row, rows);
  const std::span<float> logits(logits_.data(), static_cast<size_t>(rows * config.vocab_size));
  model_.backend().download(*logits_device_, 0, logits);
  const size_t valid = static_cast<size_t>(n_valid());
  for (int64_t row = 0; row < rows; ++row) {
    if (!all_finite(logits.subspan(static_cast<size_t>(row * config.vocab_size), valid))) {
      refuse_not_finite();
    }
  }
  // Rows that pad the vocabulary to a round size are noise, loud noise in a 4-bit head.
  for (int64_t row = 0; row < rows; ++row) {
    float* begin = logits.data() + row * config.vocab_size;
    std::fill(begin + n_valid(), begin + config.vocab_size,
              -std::numeric_limits<float>::infinity());
  }
  return logits;
}

// All of `tokens`; how many the last chunk had.
int64_t Session::run_chunks(std::span<const int32_t> tokens) {
  TQ_CHECK(!tokens.empty());
  check_fits(tokens);
  int64_t rows = 0;
  while (!tokens.empty()) {
    rows = std::min<int64_t>(acts_.max_rows, static_cast<int64_t>(tokens.size()));
    model_.backend().begin_step(rows);
    run_chunk(tokens.first(static_cast<size_t>(rows)));
    model_.backend().end_step();
    tokens = tokens.subspan(static_cast<size_t>(rows));
  }
  return rows;
}

std::span<const float> Session::feed(std::span<const int32_t> tokens) {
  return compute_logits(run_chunks(tokens) - 1, 1);
}

std::span<const Candidate> Session::feed_top(std::span<const int32_t> tokens, int64_t count) {
  run_head(run_chunks(tokens) - 1, 1);
  model_.backend().top(*logits_device_, n_valid(), count, candidates_);
  if (!std::isfinite(candidates_.front().logit)) refuse_not_finite();
  return candidates_;
}

void Session::feed_all(std::span<const int32_t> tokens, const LogitsSink& sink) {
  check_fits(tokens);
  const int64_t logit_rows = std::min(kLogitRows, acts_.max_rows);
  for (int64_t done = 0; done < static_cast<int64_t>(tokens.size());) {
    const int64_t rows =
        std::min<int64_t>(acts_.max_rows, static_cast<int64_t>(tokens.size()) - done);
    model_.backend().begin_step(rows);
    run_chunk(tokens.subspan(static_cast<size_t>(done), static_cast<size_t>(rows)));
    model_.backend().end_step();
    for (int64_t row = 0; row < rows; row += logit_rows) {
      const int64_t block = std::min(logit_rows, rows - row);
      sink(done + row, block, compute_logits(row, block));
    }
    done += rows;
  }
}

void Session::truncate(int64_t n_tokens) {
  TQ_CHECK(n_tokens >= 0 && n_tokens <= position());
  timeline_.resize(static_cast<size_t>(n_tokens));
}

}  // namespace tq
