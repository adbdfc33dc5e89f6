// rope - rotary parameters of a config.json, and the frequencies they mean (both in config.h).
//
// The frequencies follow Hugging Face transformers to the last rounding: at position 100,000 one
// unit in the last place of a frequency is an angle of 0.006. Sources: Su et al. 2021 (RoPE), the
// llama3 rule of Llama 3.1's release, Peng et al. 2023 (YaRN).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <numbers>
#include <string_view>

#include "model/config_fields.h"

namespace tq {
namespace {

constexpr double kMaxTheta = 1e12, kMaxFactor = 1e6, kTiny = 1e-9;
constexpr int64_t kMaxLength = 1 << 30;

std::string short_number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

void only_keys(const Json& rope, std::initializer_list<std::string_view> allowed,
               const std::string& where) {
  for (const auto& [key, value] : rope.items()) {
    if (key == "rope_type" || std::find(allowed.begin(), allowed.end(), key) != allowed.end()) {
      continue;
    }
    throw Error(ErrorKind::kBadData, "unknown config field", where,
                "rope " + field_text(key, value),
                "rope_type " + rope["rope_type"].get<std::string>() + " does not use it");
  }
}

double number_or(const Json& json, const char* key, double fallback, double low, double high,
                 const std::string& where) {
  return has_value(json, key) ? require_number(json, key, low, high, where) : fallback;
}

void parse_llama3(const Json& json, RopeConfig& rope, const std::string& where) {
  only_keys(json,
            {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
            where);
  rope.kind = RopeKind::kLlama3;
  rope.factor = require_number(json, "factor", 1, kMaxFactor, where);
  rope.low_freq_factor = require_number(json, "low_freq_factor", kTiny, kMaxFactor, where);
  rope.high_freq_factor = require_number(json, "high_freq_factor", kTiny, kMaxFactor, where);
  rope.original_max_seq_len = static_cast<double>(
      require_int(json, "original_max_position_embeddings", 1, kMaxLength, where));
  if (rope.high_freq_factor <= rope.low_freq_factor) {
    throw bad_config("rope high_freq_factor " + short_number(rope.high_freq_factor) +
                         " is not above low_freq_factor " + short_number(rope.low_freq_factor),
                     where);
  }
}

// transformers 4.52 to 4.57 replace the factor by max_seq_len / original, other versions and other
// programs take it as written. Where both agree there is one meaning; else the user must choose.
void check_yarn_factor(const RopeConfig& rope, int64_t max_seq_len, const std::string& where) {
  const double implied = static_cast<double>(max_seq_len) / rope.original_max_seq_len;
  if (std::abs(implied - rope.factor) <= 1e-6 * rope.factor) return;
  throw bad_config("yarn factor " + short_number(rope.factor) +
                       " is not max_position_embeddings / original_max_position_embeddings = " +
                       short_number(implied) + ", and programs disagree which one counts",
                   where,
                   "set max_position_embeddings to factor x original_max_position_embeddings");
}

void parse_yarn(const Json& json, int64_t max_seq_len, RopeConfig& rope, const std::string& where) {
  only_keys(json,
            {"factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
             "truncate", "original_max_position_embeddings",
             // transformers reads neither: the first is noted, the second says how it was trained
             "attn_factor", "finetuned"},
            where);
  rope.kind = RopeKind::kYarn;
  rope.factor = require_number(json, "factor", 1, kMaxFactor, where);
  rope.original_max_seq_len = static_cast<double>(
      optional_int(json, "original_max_position_embeddings", max_seq_len, 1, kMaxLength, where));
  if (has_value(json, "original_max_position_embeddings")) {
    check_yarn_factor(rope, max_seq_len, where);
  }
  rope.beta_fast = number_or(json, "beta_fast", 32, kTiny, kMaxFactor, where);
  rope.beta_slow = number_or(json, "beta_slow", 1, kTiny, kMaxFactor, where);
  if (rope.beta_fast < rope.beta_slow) {
    throw bad_config("rope beta_fast " + short_number(rope.beta_fast) + " is below beta_slow " +
                         short_number(rope.beta_slow),
                     where);
  }
  rope.truncate = optional_bool(json, "truncate", true, where);
  const auto scale = [&](double weight) { return 0.1 * weight * std::log(rope.factor) + 1.0; };
  const double mscale = number_or(json, "mscale", 0, 0, kMaxFactor, where);
  const double mscale_all_dim = number_or(json, "mscale_all_dim", 0, 0, kMaxFactor, where);
  const bool both = mscale != 0 && mscale_all_dim != 0;
  rope.attention_factor =
      number_or(json, "attention_factor", both ? scale(mscale) / scale(mscale_all_dim) : scale(1),
                kTiny, kMaxFactor, where);
}

// rope_scaling (v4) or rope_parameters (v5) in one spelling: no nulls, "rope_type" always there,
// theta taken out into `thetas`. Null if absent.
Json canonical(const Json& config, const char* key, std::vector<double>& thetas,
               const std::string& where) {
  if (!has_value(config, key)) return nullptr;
  if (!config[key].is_object()) throw bad_config(std::string(key) + " is not an object", where);
  Json rope = Json::object();
  for (const auto& [name, value] : config[key].items()) {
    if (!value.is_null()) rope[name] = value;
  }
  if (rope.contains("type")) {
    if (rope.contains("rope_type") && rope["rope_type"] != rope["type"]) {
      throw bad_config(std::string(key) + ": rope_type and type contradict each other", where);
    }
    rope["rope_type"] = rope["type"];
    rope.erase("type");
  }
  if (!rope.contains("rope_type")) {
    // Parameters without a type: transformers would take "default" and drop them.
    rope["rope_type"] = "default";
  }
  require_string(rope, "rope_type", where);
  if (rope.contains("rope_theta")) {
    thetas.push_back(require_number(rope, "rope_theta", 1.0 + kTiny, kMaxTheta, where));
    rope.erase("rope_theta");
  }
  if (rope.contains("partial_rotary_factor")) {
    if (rope["partial_rotary_factor"] != 1.0) {
      throw unsupported("partial_rotary_factor", rope["partial_rotary_factor"], where, "only 1");
    }
    rope.erase("partial_rotary_factor");
  }
  return rope;
}

// Range of pairs over which yarn blends, as transformers computes it: pairs below `low` turn often
// enough within the original length to be left alone, pairs above `high` too rarely.
struct YarnRange {
  double low, high;
};

YarnRange yarn_range(const RopeConfig& rope, int64_t head_dim) {
  const auto pair_with_rotations = [&](double rotations) {
    return static_cast<double>(head_dim) *
           std::log(rope.original_max_seq_len / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(rope.theta));
  };
  YarnRange range{pair_with_rotations(rope.beta_fast), pair_with_rotations(rope.beta_slow)};
  if (rope.truncate) range = {std::floor(range.low), std::ceil(range.high)};
  range.low = std::max(range.low, 0.0);
  range.high = std::min(range.high, static_cast<double>(head_dim - 1));
  if (range.low == range.high) range.high += 0.001;
  return range;
}

float yarn_frequency(float power, int64_t pair, const RopeConfig& rope, const YarnRange& range) {
  const float position = static_cast<float>(pair) - static_cast<float>(range.low);
  const float ramp = std::clamp(position / static_cast<float>(range.high - range.low), 0.0f, 1.0f);
  const float keep = 1.0f - ramp;
  const float divided = 1.0f / (static_cast<float>(rope.factor) * power);
  return divided * (1.0f - keep) + 1.0f / power * keep;
}

float llama3_frequency(float freq, const RopeConfig& rope) {
  const float factor = static_cast<float>(rope.factor);
  const float length = static_cast<float>(rope.original_max_seq_len);
  // torch divides a scalar by a tensor as reciprocal times scalar, which rounds twice.
  const float wavelength = 1.0f / freq * static_cast<float>(2 * std::numbers::pi);
  const double low_wavelength = rope.original_max_seq_len / rope.low_freq_factor;
  const double high_wavelength = rope.original_max_seq_len / rope.high_freq_factor;
  if (wavelength > static_cast<float>(low_wavelength)) return freq / factor;
  if (wavelength < static_cast<float>(high_wavelength)) return freq;
  const float smooth = (1.0f / wavelength * length - static_cast<float>(rope.low_freq_factor)) /
                       static_cast<float>(rope.high_freq_factor - rope.low_freq_factor);
  return (1.0f - smooth) * freq / factor + smooth * freq;
}

}  // namespace

double require_number(const Json& json, const char* key, double low, double high,
                      const std::string& where) {
  require(json, key, where);
  const double value = optional_number(json, key, low - 1, where);
  if (!(value >= low && value <= high)) {
    throw bad_config(field_text(key, json[key]) + ", expected a number from " + short_number(low) +
                         " to " + short_number(high),
                     where);
  }
  return value;
}

RopeConfig parse_rope(const Json& json, int64_t max_seq_len, const std::string& where) {
  std::vector<double> thetas;
  if (has_value(json, "rope_theta")) {
    thetas.push_back(require_number(json, "rope_theta", 1.0 + kTiny, kMaxTheta, where));
  }
  const Json v4 = canonical(json, "rope_scaling", thetas, where);
  const Json v5 = canonical(json, "rope_parameters", thetas, where);
  // nlohmann::json sorts its keys: the order of the two objects does not matter, nor 8 and 8.0.
  if (!v4.is_null() && !v5.is_null() && nlohmann::json(v4) != nlohmann::json(v5)) {
    throw bad_config("rope_scaling and rope_parameters contradict each other", where);
  }
  RopeConfig rope;
  if (!thetas.empty()) rope.theta = thetas[0];
  for (double theta : thetas) {
    if (theta != rope.theta) {
      throw bad_config(
          "two values of rope_theta, " + short_number(rope.theta) + " and " + short_number(theta),
          where);
    }
  }
  const Json& scaling = v5.is_null() ? v4 : v5;
  if (scaling.is_null()) return rope;
  const std::string type = scaling["rope_type"].get<std::string>();
  if (type == "default") {
    only_keys(scaling, {}, where);
  } else if (type == "llama3") {
    parse_llama3(scaling, rope, where);
  } else if (type == "yarn") {
    parse_yarn(scaling, max_seq_len, rope, where);
  } else {
    throw unsupported("rope_type", Json(type), where, "supported: default, llama3, yarn");
  }
  return rope;
}

std::vector<float> rope_inv_freq(const RopeConfig& rope, int64_t head_dim) {
  std::vector<float> freq(static_cast<size_t>(head_dim / 2));
  const YarnRange range = rope.kind == RopeKind::kYarn ? yarn_range(rope, head_dim) : YarnRange{};
  for (int64_t pair = 0; pair < head_dim / 2; ++pair) {
    // Exponent, power and quotient are rounded to f32 one after the other.
    const float exponent = static_cast<float>(2 * pair) / static_cast<float>(head_dim);
    const float theta = static_cast<float>(rope.theta);
    const float power = static_cast<float>(std::pow(double{theta}, double{exponent}));
    float& out = freq[static_cast<size_t>(pair)];
    switch (rope.kind) {
      case RopeKind::kDefault:
        out = 1.0f / power;
        break;
      case RopeKind::kLlama3:
        out = llama3_frequency(1.0f / power, rope);
        break;
      case RopeKind::kYarn:
        out = yarn_frequency(power, pair, rope, range);
        break;
    }
  }
  return freq;
}

}  // namespace tq
