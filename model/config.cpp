// config - see config.h. Every key of a config.json is read, or ignorable (the lists below), or an
// error: an unread key that changes the numbers is how a program becomes silently wrong.
//
// A null stands for an absent key everywhere, as in Hugging Face. Read next: rope.cpp.
#include "model/config.h"

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <string_view>

#include "model/config_fields.h"
#include "model/error.h"
#include "model/json.h"

namespace tq {
namespace {

// clang-format off
// Keys that parse_config() reads, or checks for the one value that we implement.
constexpr std::string_view kReadKeys[] = {
    "architectures", "model_type", "quantization_config", "compression_config",
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "eos_token_id", "hidden_act",
    "rope_theta", "rope_scaling", "rope_parameters", "rope_interleaved", "partial_rotary_factor",
    "attention_bias", "mlp_bias", "pretraining_tp", "pruned_heads", "is_encoder_decoder",
    "add_cross_attention", "use_sliding_window", "sliding_window", "layer_types"};

// Keys that do not change what the forward pass computes: bookkeeping of a checkpoint, training,
// classification heads, how transformers runs or returns things, and generation defaults that old
// versions kept here (generation_config.json holds them now). Storage types are read from the
// tensors. auto_map names code of another class; the architecture decides which one is meant.
constexpr std::string_view kIgnorableKeys[] = {
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "auto_map",
    "transformers.js_config", "transformers_weights", "unsloth_version", "unsloth_fixed",
    "is_llama_config", "torch_dtype", "dtype", "tokenizer_class", "prefix",
    "bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "initializer_range", "attention_dropout", "gradient_checkpointing", "neftune_noise_alpha",
    "finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id",
    "use_cache", "is_decoder", "tie_encoder_decoder", "cross_attention_hidden_size",
    "output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_bfloat16",
    "tf_legacy_loss", "chunk_size_feed_forward", "num_logits_to_keep", "max_window_layers",
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_flash_attn_2_enabled", "attn_implementation",
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens",
    "temperature", "top_k", "top_p", "typical_p",
    "unsloth_tiled_mlp", "_unsloth_temporary_saved_buffers", "trust_remote_code", "loss_type",
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "dropout", "classifier_dropout",
    "label_smoothing", "output_router_logits", "router_aux_loss_coef", "use_flash_attn",
    "use_flash_attention", "use_flash_attention_2", "flash_attn", "use_flashattn", "use_sdpa",
    "use_fused_cross_entropy", "logits_to_keep", "cache_implementation", "model_max_length",
    "tokenizer_model_max_length", "max_sequence_length", "max_new_tokens", "unk_token_id",
    "bos_token", "eos_token", "pad_token", "unk_token", "base_model", "model_name", "license",
    "language", "tags", "library_name", "pipeline_tag", "ignore_index", 
    "keys_to_ignore_at_inference"};

// Keys of other models that fine-tuning tools write with the value that turns them off.
constexpr std::string_view kFalseKeys[] = {"use_mrope", "qkv_bias", "use_qkv_bias", "use_bias",
                                           "use_moe"};
// clang-format on

// Bounds: generous for models of these families, small enough that products of two fit 64 bits.
constexpr int64_t kMaxDim = 65536, kMaxHiddenDim = 1 << 20, kMaxLayers = 1024, kMaxHeads = 1024;
constexpr int64_t kMaxHeadDim = 4096, kMaxVocab = 1 << 20, kMaxSeqLen = 1 << 30;

void check_no_unknown_keys(const Json& json, const std::string& where) {
  const auto listed = [](const auto& keys, const std::string& key) {
    return std::find(std::begin(keys), std::end(keys), key) != std::end(keys);
  };
  for (const auto& [key, value] : json.items()) {
    if (value.is_null() || listed(kReadKeys, key) || listed(kIgnorableKeys, key)) continue;
    if (value == false && listed(kFalseKeys, key)) continue;
    throw Error(ErrorKind::kBadData, "unknown config field", where, field_text(key, value),
                "it may change the results, so it is not ignored");
  }
}

void check_false(const Json& json, const char* key, const std::string& where) {
  if (optional_bool(json, key, false, where))
    throw unsupported(key, json[key], where, "only false");
}

// Fields with one value that we implement.
void check_unsupported_values(const Json& json, const std::string& where) {
  for (const char* key : {"quantization_config", "compression_config"}) {
    if (has_value(json, key)) {
      throw Error(ErrorKind::kBadData, "model is already quantized", where,
                  std::string("it has a ") + key, "use the original 16-bit model");
    }
  }
  for (const char* key : {"attention_bias", "mlp_bias", "rope_interleaved", "use_sliding_window",
                          "is_encoder_decoder", "add_cross_attention"}) {
    check_false(json, key, where);
  }
  if (has_value(json, "hidden_act") && json["hidden_act"] != "silu") {
    throw unsupported("hidden_act", json["hidden_act"], where, "only silu");
  }
  if (has_value(json, "pretraining_tp") && json["pretraining_tp"] != 1) {
    throw unsupported("pretraining_tp", json["pretraining_tp"], where, "only 1");
  }
  if (has_value(json, "partial_rotary_factor") && json["partial_rotary_factor"] != 1.0) {
    throw unsupported("partial_rotary_factor", json["partial_rotary_factor"], where, "only 1");
  }
  if (has_value(json, "pruned_heads") && !json["pruned_heads"].empty()) {
    throw unsupported("pruned_heads", json["pruned_heads"], where, "only {}");
  }
  // "use_sliding_window": false makes the width irrelevant; without it the width counts.
  if (has_value(json, "sliding_window") && !has_value(json, "use_sliding_window")) {
    throw unsupported("sliding_window", json["sliding_window"], where);
  }
}

void check_layer_types(const Json& json, int64_t n_layers, const std::string& where) {
  if (!has_value(json, "layer_types")) return;
  const Json& types = json["layer_types"];
  if (!types.is_array() || types.size() != static_cast<size_t>(n_layers)) {
    throw bad_config("layer_types is not an array of num_hidden_layers = " +
                         std::to_string(n_layers) + " entries",
                     where);
  }
  for (const Json& type : types) {
    if (type != "full_attention") {
      throw unsupported("layer_types", type, where, "only full_attention");
    }
  }
}

Arch parse_arch(const Json& json, const std::string& where) {
  struct Known {
    Arch arch;
    std::string_view class_name, model_type;
  };
  constexpr Known known[] = {{Arch::kLlama, "LlamaForCausalLM", "llama"},
                             {Arch::kQwen3, "Qwen3ForCausalLM", "qwen3"}};
  const auto fail = [&](const std::string& name) {
    return Error(ErrorKind::kBadData, "architecture not supported", where, name,
                 "supported: LlamaForCausalLM, Qwen3ForCausalLM");
  };
  std::string class_name, model_type;
  if (has_value(json, "architectures")) {
    const Json& names = json["architectures"];
    if (!names.is_array() || names.empty() || !names[0].is_string()) {
      throw bad_config("architectures is not a list of names", where);
    }
    class_name = names[0].get<std::string>();
  }
  if (has_value(json, "model_type")) model_type = require_string(json, "model_type", where);
  for (const Known& k : known) {
    if (class_name.empty() ? model_type != k.model_type : class_name != k.class_name) continue;
    if (!model_type.empty() && model_type != k.model_type) {
      throw bad_config("architectures says " + class_name + ", model_type says " + model_type,
                       where);
    }
    return k.arch;
  }
  if (class_name.empty() && model_type.empty()) throw fail("neither architectures nor model_type");
  throw fail(class_name.empty() ? "model_type " + model_type : class_name);
}

void read_sizes(const Json& json, Config& c, const std::string& where) {
  c.dim = require_int(json, "hidden_size", 1, kMaxDim, where);
  c.hidden_dim = require_int(json, "intermediate_size", 1, kMaxHiddenDim, where);
  c.n_layers = require_int(json, "num_hidden_layers", 1, kMaxLayers, where);
  c.n_heads = require_int(json, "num_attention_heads", 1, kMaxHeads, where);
  c.n_kv_heads = optional_int(json, "num_key_value_heads", c.n_heads, 1, kMaxHeads, where);
  c.vocab_size = require_int(json, "vocab_size", 1, kMaxVocab, where);
  c.max_seq_len = require_int(json, "max_position_embeddings", 1, kMaxSeqLen, where);
  if (c.n_heads % c.n_kv_heads != 0) {
    throw bad_config("num_attention_heads " + std::to_string(c.n_heads) +
                         " is not a multiple of num_key_value_heads " +
                         std::to_string(c.n_kv_heads),
                     where);
  }
  if (has_value(json, "head_dim")) {
    c.head_dim = require_int(json, "head_dim", 1, kMaxHeadDim, where);
  } else if (c.dim % c.n_heads == 0) {
    c.head_dim = c.dim / c.n_heads;  // the tensor shapes will confirm it or not
  } else {
    throw bad_config("hidden_size " + std::to_string(c.dim) +
                         " is not a multiple of num_attention_heads " + std::to_string(c.n_heads) +
                         " and there is no head_dim",
                     where);
  }
  if (c.head_dim % 2 != 0) {
    throw bad_config("head_dim " + std::to_string(c.head_dim) + " is odd (hidden_size " +
                         std::to_string(c.dim) + ", num_attention_heads " +
                         std::to_string(c.n_heads) + ")",
                     where);
  }
}

std::vector<int32_t> parse_eos(const Json& json, const std::string& where) {
  std::vector<int32_t> ids;
  if (!has_value(json, "eos_token_id")) return ids;
  const Json& value = json["eos_token_id"];
  for (const Json& id : value.is_array() ? value : Json::array({value})) {
    const Json single = Json::object({{"eos_token_id", id}});
    ids.push_back(static_cast<int32_t>(require_int(single, "eos_token_id", 0, INT32_MAX, where)));
  }
  return ids;
}

}  // namespace

Config parse_config(const std::string& json_text, const std::string& where) {
  const Json json = parse_json(json_text, where);
  if (!json.is_object()) throw bad_config("not a JSON object", where);
  Config c;
  c.arch = parse_arch(json, where);
  check_unsupported_values(json, where);
  check_no_unknown_keys(json, where);
  read_sizes(json, c, where);
  check_layer_types(json, c.n_layers, where);
  // Not below what f32 tells from zero, so that a row of zeros does not become NaN.
  c.norm_eps = static_cast<float>(require_number(json, "rms_norm_eps", 1e-30, 1.0, where));
  c.tied = optional_bool(json, "tie_word_embeddings", false, where);
  c.rope = parse_rope(json, c.max_seq_len, where);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (has_value(json, key) && has_value(json[key], "attn_factor")) {
      char factor[32];
      std::snprintf(factor, sizeof factor, "%.4f", c.rope.attention_factor);
      c.notes.push_back(std::string("attn_factor in ") + key +
                        " of config.json is not followed, as in transformers, which reads "
                        "attention_factor: that is " +
                        factor + " here");
    }
  }
  c.eos_ids = parse_eos(json, where);
  return c;
}

}  // namespace tq
