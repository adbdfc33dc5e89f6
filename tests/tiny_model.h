// tiny_model - a random model in memory, with widths that pack without remainders.
#pragma once

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "model/weights.h"
#include "quant/rng.h"

namespace tq {

/// Qwen3 has a norm of every head of q and k beside what Llama has.
enum class TinyFamily { kLlama, kQwen3 };

/// Three layers, dim 128, heads of 48 unless told (not dim / heads), hidden_dim 256, vocabulary
/// of 96. Weights have heavy-tailed columns, as trained models do, so that methods differ.
class TinyModel {
 public:
  explicit TinyModel(bool tied, uint64_t seed = 1, Storage storage = Storage::kF32,
                     TinyFamily family = TinyFamily::kLlama, int64_t head_dim = 48)
      : rng_(seed), storage_(storage) {
    const bool qwen3 = family == TinyFamily::kQwen3;
    model_.texts.config =
        std::string(qwen3 ? R"({"architectures":["Qwen3ForCausalLM"],"model_type":"qwen3",)"
                          : R"({"architectures":["LlamaForCausalLM"],"model_type":"llama",)") +
        R"("hidden_size":128,"intermediate_size":256,"num_hidden_layers":3,)" +
        R"("num_attention_heads":4,"num_key_value_heads":2,"vocab_size":96,"head_dim":)" +
        std::to_string(head_dim) +
        R"(,"max_position_embeddings":512,"rms_norm_eps":1e-5,"rope_theta":10000.0,)" +
        R"("hidden_act":"silu","tie_word_embeddings":)" + (tied ? "true}" : "false}");
    model_.texts.tokenizer = "{}";  // never parsed in these tests
    model_.config = parse_config(model_.texts.config, "tiny");
    model_.quantization = {{"method", "none"}};
    model_.source = "tiny";
    const Config& c = model_.config;
    model_.tok_embed = matrix(c.vocab_size, c.dim);
    model_.lm_head.weight = tied ? model_.tok_embed : matrix(c.vocab_size, c.dim);
    model_.final_norm = gains(c.dim);
    for (int64_t i = 0; i < c.n_layers; ++i) {
      Layer layer;
      layer.attn_norm = gains(c.dim);
      layer.ffn_norm = gains(c.dim);
      if (qwen3) {
        layer.q_norm = gains(c.head_dim);
        layer.k_norm = gains(c.head_dim);
      }
      layer.wq.weight = matrix(c.q_dim(), c.dim);
      layer.wk.weight = matrix(c.kv_dim(), c.dim);
      layer.wv.weight = matrix(c.kv_dim(), c.dim);
      layer.wo.weight = matrix(c.dim, c.q_dim());
      layer.w_gate.weight = matrix(c.hidden_dim, c.dim);
      layer.w_up.weight = matrix(c.hidden_dim, c.dim);
      layer.w_down.weight = matrix(c.dim, c.hidden_dim);
      model_.layers.push_back(layer);
    }
  }
  const Model& model() const { return model_; }
  /// Bytes behind the views, to damage them.
  std::vector<float>& values(size_t index) { return *floats_[index]; }

 private:
  Matrix matrix(int64_t rows, int64_t cols) {
    auto values = std::make_unique<std::vector<float>>(static_cast<size_t>(rows * cols));
    for (int64_t i = 0; i < rows * cols; ++i) {
      const double loud = i % cols % 37 == 5 ? 8.0 : 1.0;
      (*values)[static_cast<size_t>(i)] =
          static_cast<float>(loud * rng_.normal() / std::sqrt(static_cast<double>(cols)));
    }
    Matrix m;
    m.storage = storage_;
    m.rows = rows;
    m.cols = cols;
    m.data = reinterpret_cast<const std::byte*>(values->data());
    if (storage_ != Storage::kF32) {
      auto half = std::make_unique<std::vector<uint16_t>>();
      for (float v : *values) {
        half->push_back(storage_ == Storage::kF16 ? f32_to_f16(v) : f32_to_bf16(v));
      }
      m.data = reinterpret_cast<const std::byte*>(half->data());
      halves_.push_back(std::move(half));
    }
    floats_.push_back(std::move(values));
    return m;
  }
  std::vector<float> gains(int64_t n) {
    std::vector<float> values(static_cast<size_t>(n));
    for (float& v : values) v = static_cast<float>(0.5 + rng_.uniform());
    return values;
  }

  SplitMix64 rng_;
  Storage storage_;
  Model model_;
  std::vector<std::unique_ptr<std::vector<float>>> floats_;
  std::vector<std::unique_ptr<std::vector<uint16_t>>> halves_;
};

inline std::vector<int32_t> random_ids(int64_t count, int32_t vocab, uint64_t seed) {
  SplitMix64 rng(seed);
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int32_t& id : ids) id = static_cast<int32_t>(rng.next() % static_cast<uint64_t>(vocab));
  return ids;
}

}  // namespace tq
