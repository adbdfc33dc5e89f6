// config - see config.h. Every key of a config.json is read, ignorable (the list below), or an
// error: an unread key that changes the numbers is how other programs become silently wrong.
#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <string_view>

#include "model/error.h"
#include "model/json.h"

namespace tq {
namespace {

// Keys that do not change what the forward pass computes, or whose only accepted value is checked
// in check_unsupported(). Tokens ids other than eos belong to the tokenizer.
constexpr std::string_view kIgnorable[] = {"_name_or_path",
                                           "architectures",
                                           "attention_bias",
                                           "attention_dropout",
                                           "auto_map",
                                           "bos_token_id",
                                           "chunk_size_feed_forward",
                                           "decoder_start_token_id",
                                           "dtype",
                                           "eos_token_id",
                                           "head_dim",
                                           "hidden_act",
                                           "hidden_size",
                                           "id2label",
                                           "initializer_range",
                                           "intermediate_size",
                                           "is_decoder",
                                           "is_encoder_decoder",
                                           "is_llama_config",
                                           "label2id",
                                           "layer_types",
                                           "max_position_embeddings",
                                           "max_window_layers",
                                           "mlp_bias",
                                           "model_type",
                                           "num_attention_heads",
                                           "num_hidden_layers",
                                           "num_key_value_heads",
                                           "output_attentions",
                                           "output_hidden_states",
                                           "pad_token_id",
                                           "pretraining_tp",
                                           "problem_type",
                                           "quantization_config",
                                           "return_dict",
                                           "rms_norm_eps",
                                           "rope_interleaved",
                                           "rope_parameters",
                                           "rope_scaling",
                                           "rope_theta",
                                           "sep_token_id",
                                           "sliding_window",
                                           "task_specific_params",
                                           "tie_word_embeddings",
                                           "tokenizer_class",
                                           "torch_dtype",
                                           "transformers.js_config",
                                           "transformers_version",
                                           "unsloth_fixed",
                                           "unsloth_version",
                                           "use_cache",
                                           "use_sliding_window",
                                           "vocab_size"};

Error unsupported(const std::string& where, const std::string& field, const Json& value,
                  const std::string& hint = "") {
  return Error(ErrorKind::kBadData, "config value not supported", where,
               field + " = " + value.dump().substr(0, 80), hint);
}

Error wrong(const std::string& where, const std::string& why, const std::string& hint = "") {
  return Error(ErrorKind::kBadData, "bad config", where, why, hint);
}

void check_keys(const Json& json, const std::string& where) {
  for (const auto& item : json.items()) {
    const bool known =
        std::find(std::begin(kIgnorable), std::end(kIgnorable), item.key()) != std::end(kIgnorable);
    // null and false switch a feature off, whatever it is.
    if (known || item.value().is_null() || item.value() == Json(false)) continue;
    throw Error(ErrorKind::kBadData, "unknown config field", where,
                item.key() + " = " + item.value().dump().substr(0, 80),
                "tq does not know whether it changes the results, so it stops here");
  }
}

// Fields with one value that we implement.
void check_unsupported(const Json& json, const std::string& where) {
  if (json.contains("quantization_config") && !json["quantization_config"].is_null()) {
    throw Error(ErrorKind::kBadData, "model is already quantized", where,
                "it has a quantization_config", "use the original 16-bit model");
  }
  for (const char* field : {"attention_bias", "mlp_bias", "rope_interleaved", "use_sliding_window",
                            "is_encoder_decoder"}) {
    if (optional_bool(json, field, false, where)) throw unsupported(where, field, json[field]);
  }
  if (json.contains("hidden_act") && json["hidden_act"] != "silu") {
    throw unsupported(where, "hidden_act", json["hidden_act"], "only silu");
  }
  if (optional_int(json, "pretraining_tp", 1, 0, 1 << 20, where) > 1) {
    throw unsupported(where, "pretraining_tp", json["pretraining_tp"], "only 1");
  }
  // use_sliding_window = false makes the window's size irrelevant; without that field it counts.
  if (json.contains("sliding_window") && !json["sliding_window"].is_null() &&
      !json.contains("use_sliding_window")) {
    throw unsupported(where, "sliding_window", json["sliding_window"]);
  }
  if (json.contains("layer_types") && !json["layer_types"].is_null()) {
    const Json& types = json["layer_types"];
    if (!types.is_array()) throw wrong(where, "layer_types is not an array");
    for (const Json& type : types) {
      if (type != "full_attention") throw unsupported(where, "layer_types entry", type);
    }
  }
}

Arch parse_arch(const Json& json, const std::string& where) {
  const auto fail = [&](const std::string& name) {
    return Error(ErrorKind::kBadData, "architecture not supported", where, name,
                 "supported: LlamaForCausalLM, Qwen3ForCausalLM");
  };
  if (json.contains("architectures") && json["architectures"].is_array() &&
      !json["architectures"].empty() && json["architectures"][0].is_string()) {
    const std::string name = json["architectures"][0].get<std::string>();
    if (name == "LlamaForCausalLM") return Arch::kLlama;
    if (name == "Qwen3ForCausalLM") return Arch::kQwen3;
    throw fail(name);
  }
  const std::string type = require_string(json, "model_type", where);
  if (type == "llama") return Arch::kLlama;
  if (type == "qwen3") return Arch::kQwen3;
  throw fail(type);
}

double positive(const Json& json, const char* key, const std::string& where) {
  require(json, key, where);
  const double value = optional_number(json, key, 0, where);
  if (!(value > 0)) {
    throw wrong(where, std::string(key) + " is " + json[key].dump() + ", expected above 0");
  }
  return value;
}

double positive_or(const Json& json, const char* key, double fallback, const std::string& where) {
  return json.contains(key) && !json[key].is_null() ? positive(json, key, where) : fallback;
}

void only_keys(const Json& json, const std::string& what, const std::string& where,
               std::initializer_list<std::string_view> allowed) {
  for (const auto& item : json.items()) {
    if (item.value().is_null()) continue;
    if (std::find(allowed.begin(), allowed.end(), item.key()) == allowed.end()) {
      throw Error(ErrorKind::kBadData, "unknown config field", where,
                  what + "." + item.key() + " = " + item.value().dump().substr(0, 80));
    }
  }
}

void parse_llama3(const Json& json, RopeConfig& rope, const std::string& where) {
  only_keys(json, "rope", where,
            {"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
             "original_max_position_embeddings"});
  rope.kind = RopeKind::kLlama3;
  rope.factor = positive(json, "factor", where);
  rope.low_freq_factor = positive(json, "low_freq_factor", where);
  rope.high_freq_factor = positive(json, "high_freq_factor", where);
  rope.original_max_seq_len = positive(json, "original_max_position_embeddings", where);
  if (rope.high_freq_factor <= rope.low_freq_factor) {
    throw wrong(where, "rope high_freq_factor must be above low_freq_factor");
  }
}

// transformers up to 4.52 and from 5.0 on scale by `factor`; versions between use the ratio of the
// two lengths. Where both agree there is one meaning; otherwise the user must choose.
void parse_yarn(const Json& json, int64_t max_seq_len, RopeConfig& rope, const std::string& where) {
  only_keys(json, "rope", where,
            {"rope_type", "type", "rope_theta", "factor", "beta_fast", "beta_slow",
             "attention_factor", "truncate", "original_max_position_embeddings"});
  rope.kind = RopeKind::kYarn;
  rope.factor = positive(json, "factor", where);
  rope.original_max_seq_len = positive_or(json, "original_max_position_embeddings",
                                          static_cast<double>(max_seq_len), where);
  rope.beta_fast = positive_or(json, "beta_fast", 32, where);
  rope.beta_slow = positive_or(json, "beta_slow", 1, where);
  rope.truncate = optional_bool(json, "truncate", true, where);
  const double inferred = rope.factor <= 1 ? 1.0 : 0.1 * std::log(rope.factor) + 1.0;
  rope.attention_factor = positive_or(json, "attention_factor", inferred, where);
  const double ratio = static_cast<double>(max_seq_len) / rope.original_max_seq_len;
  if (json.contains("original_max_position_embeddings") &&
      std::abs(ratio - rope.factor) > 1e-6 * rope.factor) {
    throw wrong(where,
                "yarn factor " + json["factor"].dump() +
                    " differs from max_position_embeddings / original_max_position_embeddings, and "
                    "programs disagree which one counts",
                "set max_position_embeddings to factor * original_max_position_embeddings");
  }
}

std::string rope_type(const Json& json, const std::string& where) {
  const bool both = json.contains("rope_type") && json.contains("type");
  if (both && json["rope_type"] != json["type"]) {
    throw wrong(where, "rope_type and type contradict each other");
  }
  if (json.contains("rope_type")) return require_string(json, "rope_type", where);
  if (json.contains("type")) return require_string(json, "type", where);
  return "default";
}

// The scaling object and theta, from either schema; both may be present if they agree.
RopeConfig parse_rope(const Json& json, int64_t max_seq_len, const std::string& where) {
  const auto object = [&](const char* key) {
    if (!json.contains(key) || json[key].is_null()) return Json();
    if (!json[key].is_object()) throw wrong(where, std::string(key) + " is not an object");
    return json[key];
  };
  const Json v4 = object("rope_scaling");
  const Json v5 = object("rope_parameters");
  RopeConfig rope;
  const bool top_theta = json.contains("rope_theta") && !json["rope_theta"].is_null();
  if (top_theta) rope.theta = positive(json, "rope_theta", where);
  if (v5.is_object() && v5.contains("rope_theta")) {
    const double theta = positive(v5, "rope_theta", where);
    if (top_theta && theta != rope.theta) {
      throw wrong(where, "rope_theta and rope_parameters.rope_theta contradict each other");
    }
    rope.theta = theta;
  }
  Json scaling = v5.is_object() ? v5 : v4;
  if (v4.is_object() && v5.is_object()) {
    Json bare = v5;
    bare.erase("rope_theta");
    Json old = v4;
    old.erase("rope_theta");
    // Order and spelling of the type may differ; the values may not.
    for (Json* side : {&bare, &old}) {
      const std::string type = rope_type(*side, where);
      side->erase("type");
      (*side)["rope_type"] = type;
    }
    if (nlohmann::json(bare) != nlohmann::json(old)) {
      throw wrong(where, "rope_scaling and rope_parameters contradict each other");
    }
  }
  if (!scaling.is_object()) return rope;
  const std::string type = rope_type(scaling, where);
  if (type == "default") {
    only_keys(scaling, "rope", where, {"rope_type", "type", "rope_theta"});
  } else if (type == "llama3") {
    parse_llama3(scaling, rope, where);
  } else if (type == "yarn") {
    parse_yarn(scaling, max_seq_len, rope, where);
  } else {
    throw unsupported(where, "rope_type", Json(type), "supported: default, llama3, yarn");
  }
  return rope;
}

std::vector<int32_t> parse_eos(const Json& json, const std::string& where) {
  std::vector<int32_t> ids;
  if (!json.contains("eos_token_id") || json["eos_token_id"].is_null()) return ids;
  const Json& value = json["eos_token_id"];
  for (const Json& id : value.is_array() ? value : Json::array({value})) {
    ids.push_back(static_cast<int32_t>(
        require_int(Json{{"eos_token_id", id}}, "eos_token_id", 0, INT32_MAX, where)));
  }
  return ids;
}

}  // namespace

Config parse_config(const std::string& json_text, const std::string& where) {
  const Json json = parse_json(json_text, where);
  if (!json.is_object()) throw wrong(where, "not a JSON object");
  Config c;
  c.arch = parse_arch(json, where);
  check_unsupported(json, where);
  check_keys(json, where);
  // Bounds: generous for any model of these families, small enough that products fit 64 bits.
  c.dim = require_int(json, "hidden_size", 1, 65536, where);
  c.hidden_dim = require_int(json, "intermediate_size", 1, 1 << 20, where);
  c.n_layers = require_int(json, "num_hidden_layers", 1, 1024, where);
  c.n_heads = require_int(json, "num_attention_heads", 1, 1024, where);
  c.n_kv_heads = optional_int(json, "num_key_value_heads", c.n_heads, 1, 1024, where);
  c.vocab_size = require_int(json, "vocab_size", 1, 1 << 20, where);
  c.max_seq_len = require_int(json, "max_position_embeddings", 1, 1 << 24, where);
  c.head_dim = optional_int(json, "head_dim", 0, 1, 4096, where);
  if (c.head_dim == 0) {
    // transformers' own default: Qwen3 declares 128, Llama derives the quotient.
    c.head_dim = c.arch == Arch::kQwen3 ? 128 : c.dim / c.n_heads;
    if (c.arch == Arch::kLlama && c.dim % c.n_heads != 0) {
      throw wrong(where, "hidden_size " + std::to_string(c.dim) +
                             " is not a multiple of num_attention_heads " +
                             std::to_string(c.n_heads) + " and there is no head_dim");
    }
  }
  if (c.n_heads % c.n_kv_heads != 0) {
    throw wrong(where, "num_attention_heads " + std::to_string(c.n_heads) +
                           " is not a multiple of num_key_value_heads " +
                           std::to_string(c.n_kv_heads));
  }
  if (c.head_dim % 2 != 0) {
    throw wrong(where, "head_dim " + std::to_string(c.head_dim) + " is odd");
  }
  c.norm_eps = static_cast<float>(positive(json, "rms_norm_eps", where));
  c.tied = optional_bool(json, "tie_word_embeddings", false, where);
  c.rope = parse_rope(json, c.max_seq_len, where);
  c.eos_ids = parse_eos(json, where);
  return c;
}

std::vector<float> rope_inv_freq(const RopeConfig& rope, int64_t head_dim) {
  constexpr double kPi = 3.14159265358979323846;
  const int64_t pairs = head_dim / 2;
  std::vector<float> freq(static_cast<size_t>(pairs));
  // yarn: pairs below `low` keep their frequency, above `high` are divided by the factor.
  double low = 0, high = 0;
  if (rope.kind == RopeKind::kYarn) {
    const auto pair_with_rotations = [&](double rotations) {
      return static_cast<double>(head_dim) *
             std::log(rope.original_max_seq_len / (rotations * 2 * kPi)) /
             (2 * std::log(rope.theta));
    };
    low = pair_with_rotations(rope.beta_fast);
    high = pair_with_rotations(rope.beta_slow);
    if (rope.truncate) {
      low = std::floor(low);
      high = std::ceil(high);
    }
    low = std::max(low, 0.0);
    high = std::min(high, static_cast<double>(head_dim - 1));
    if (low == high) high += 0.001;
  }
  for (int64_t i = 0; i < pairs; ++i) {
    // transformers rounds the exponent, the power and the quotient to f32, one after the other; an
    // angle at position 100,000 shows any other order.
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    const float power = static_cast<float>(std::pow(rope.theta, static_cast<double>(exponent)));
    const float f = 1.0f / power;
    float& out = freq[static_cast<size_t>(i)];
    out = f;
    const float factor = static_cast<float>(rope.factor);
    if (rope.kind == RopeKind::kLlama3) {
      const float length = static_cast<float>(rope.original_max_seq_len);
      const float wavelength = static_cast<float>(2 * kPi) / f;
      const float low_wave = length / static_cast<float>(rope.low_freq_factor);
      const float high_wave = length / static_cast<float>(rope.high_freq_factor);
      if (wavelength > low_wave) {
        out = f / factor;
      } else if (wavelength >= high_wave) {
        const float smooth = (length / wavelength - static_cast<float>(rope.low_freq_factor)) /
                             static_cast<float>(rope.high_freq_factor - rope.low_freq_factor);
        out = (1 - smooth) * (f / factor) + smooth * f;
      }
    } else if (rope.kind == RopeKind::kYarn) {
      const float ramp = std::clamp(
          (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low), 0.0f,
          1.0f);
      const float keep = 1 - ramp;
      out = (1.0f / (factor * power)) * (1 - keep) + f * keep;
    }
  }
  return freq;
}

}  // namespace tq
