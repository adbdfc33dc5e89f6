// config - the hyperparameters of a Llama-3 or Qwen3 model, from Hugging Face's config.json.
//
// Reads both spellings (transformers v4: rope_theta + rope_scaling; v5: rope_parameters). A field
// that would change the numbers and is not implemented is an error that names it; the list of
// ignorable keys is in config.cpp. Names follow docs/method.md, not config.json:
//   dim = hidden_size, hidden_dim = intermediate_size.   Read next: model/weights.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tq {

enum class Arch { kLlama, kQwen3 };

enum class RopeKind { kDefault, kLlama3, kYarn };

/// Rotary embedding. Pairs are (i, i + head_dim/2), the Hugging Face half-split convention.
struct RopeConfig {
  RopeKind kind = RopeKind::kDefault;
  double theta = 10000.0;
  double factor = 1.0;
  double original_max_seq_len = 0;                   // llama3, yarn
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3
  double beta_fast = 32, beta_slow = 1;              // yarn
  double attention_factor = 1.0;                     // yarn: multiplies cos and sin
  bool truncate = true;                              // yarn: round the correction range to integers
};

struct Config {
  Arch arch = Arch::kLlama;
  int64_t dim = 0;         // residual width
  int64_t hidden_dim = 0;  // FFN inner width
  int64_t n_layers = 0;
  int64_t n_heads = 0;
  int64_t n_kv_heads = 0;
  int64_t head_dim = 0;    // explicit in the config, or dim / n_heads when absent
  int64_t vocab_size = 0;  // rows of the embedding; may exceed the tokenizer's size
  int64_t max_seq_len = 0;
  float norm_eps = 0;
  bool tied = false;  // lm_head is the embedding
  RopeConfig rope;
  std::vector<int32_t> eos_ids;    // of config.json alone; tokenizer/chat.h makes the union
  std::vector<std::string> notes;  // what a user should know about the file, a sentence each

  bool has_qk_norm() const { return arch == Arch::kQwen3; }
  int64_t q_dim() const { return n_heads * head_dim; }
  int64_t kv_dim() const { return n_kv_heads * head_dim; }
};

/// Parses the text of a config.json. `where` names the file in errors.
/// Throws Error(kBadData) naming the field, and for every unsupported value that changes results.
Config parse_config(const std::string& json_text, const std::string& where);

/// Rotary frequencies in radians per position, [head_dim / 2], with the scaling of the config
/// applied (llama3: users of Llama 3.1+; yarn: Qwen3 long context). Computed in double, rounded to
/// float where transformers does, so that angles agree at positions of 100,000.
std::vector<float> rope_inv_freq(const RopeConfig& rope, int64_t head_dim);

}  // namespace tq
