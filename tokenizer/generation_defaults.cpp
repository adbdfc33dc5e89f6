// generation_defaults - when to stop and how to sample, from the model folder; see chat.h.
#include <algorithm>

#include "model/error.h"
#include "model/json.h"
#include "tokenizer/chat.h"
#include "tokenizer/component.h"

namespace tq {
namespace {

constexpr const char* kHint = "correct it, or run with --ignore-eos and name the end with --stop";

// `file`: which of the folder's texts it is, for messages.
Json parse_object(const std::string& text, const std::string& folder, const char* file) {
  if (text.empty()) return Json::object();
  const std::string where = folder + ": " + file;
  Json json = parse_json(text, where);
  if (!json.is_object()) throw Error(ErrorKind::kBadData, "top level", where, "must be an object");
  return json;
}

void add_stop(int64_t id, const char* source, const Tokenizer& tokenizer, const std::string& where,
              std::vector<int32_t>& ids) {
  if (id < 0 || id >= tokenizer.size()) {
    throw Error(ErrorKind::kBadData, std::string("eos_token_id in ") + source, where,
                std::to_string(id) + " is no token: there are " + std::to_string(tokenizer.size()),
                kHint);
  }
  ids.push_back(static_cast<int32_t>(id));
}

int64_t id_of_json(const Json& json, const std::string& where) {
  if (!json.is_number_integer()) {
    throw Error(ErrorKind::kBadData, "eos_token_id", where, "must be an integer or a list of them");
  }
  // Larger than any id, so that the caller names it.
  return json.is_number_unsigned() && json.get<uint64_t>() > INT32_MAX ? INT64_MAX
                                                                       : json.get<int64_t>();
}

// Keys of transformers' GenerationConfig that change the text and that tq does not implement,
// with the values that leave the text alone.
struct Neutral {
  const char* key;
  double value;
};
constexpr Neutral kUnsupported[] = {{"encoder_repetition_penalty", 1},
                                    {"typical_p", 1},
                                    {"epsilon_cutoff", 0},
                                    {"eta_cutoff", 0},
                                    {"top_h", 0},
                                    {"no_repeat_ngram_size", 0},
                                    {"encoder_no_repeat_ngram_size", 0},
                                    {"num_beams", 1},
                                    {"num_beam_groups", 1},
                                    {"diversity_penalty", 0},
                                    {"penalty_alpha", 0},
                                    {"min_length", 0},
                                    {"guidance_scale", 1}};
constexpr const char* kUnsupportedLists[] = {"bad_words_ids",
                                             "suppress_tokens",
                                             "begin_suppress_tokens",
                                             "sequence_bias",
                                             "forced_bos_token_id",
                                             "forced_eos_token_id",
                                             "exponential_decay_length_penalty",
                                             "stop_strings",
                                             "watermarking_config"};

// The options in force that tq does not have, with their values.
std::vector<std::string> unsupported_options(const Json& json, const std::string& where) {
  std::vector<std::string> found;
  for (const Neutral& key : kUnsupported) {
    if (optional_number(json, key.key, key.value, where) != key.value) found.push_back(key.key);
  }
  for (const char* key : kUnsupportedLists) {
    const Json* value = member(json, key);
    if (value && !(value->is_array() && value->empty())) found.push_back(key);
  }
  return found;
}

// A value of generation_config.json that counts only if the user gives no `option`.
double number_in(const Json& json, const char* key, double fallback, double low, double high,
                 const char* option, const std::string& where) {
  const double value = optional_number(json, key, fallback, where + ": generation_config.json");
  if (!(value >= low && value <= high)) {  // also false for NaN
    throw Error(ErrorKind::kBadData, std::string("generation_config.json: ") + key, where,
                "is out of range", std::string("give ") + option);
  }
  return value;
}

}  // namespace

std::vector<int32_t> stop_tokens(const ModelTexts& texts, const Config& config,
                                 const Tokenizer& tokenizer, const std::string& where) {
  std::vector<int32_t> ids;
  const Json generation = parse_object(texts.generation_config, where, "generation_config.json");
  if (const Json* eos = member(generation, "eos_token_id")) {
    if (eos->is_array()) {
      for (const Json& id : *eos) {
        add_stop(id_of_json(id, where + ": generation_config.json"), "generation_config.json",
                 tokenizer, where, ids);
      }
    } else {
      add_stop(id_of_json(*eos, where + ": generation_config.json"), "generation_config.json",
               tokenizer, where, ids);
    }
  }
  for (const int32_t id : config.eos_ids) add_stop(id, "config.json", tokenizer, where, ids);
  const Json tokenizer_config =
      parse_object(texts.tokenizer_config, where, "tokenizer_config.json");
  if (const Json* eos = member(tokenizer_config, "eos_token")) {
    const std::string text = eos->is_object()
                                 ? require_string(*eos, "content", where)
                                 : require_string(tokenizer_config, "eos_token", where);
    const std::optional<int32_t> id = tokenizer.id_of(text);
    if (!id) {
      throw Error(ErrorKind::kBadData, "eos_token '" + text + "' in tokenizer_config.json", where,
                  "is not a token", kHint);
    }
    ids.push_back(*id);
  }
  // Ends of a turn that instruct models emit even where a configuration forgets them.
  for (const char* name :
       {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"}) {
    const std::optional<int32_t> id = tokenizer.id_of(name);
    if (id && tokenizer.is_special(*id)) ids.push_back(*id);
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

Sampling sampling_of(const ModelTexts& texts, const SamplingWishes& wishes,
                     const std::string& where) {
  const Json json = parse_object(texts.generation_config, where, "generation_config.json");
  Sampling sampling;
  for (const std::string& key : unsupported_options(json, where)) {
    if (!wishes.any()) {
      throw Error(ErrorKind::kBadData, "generation_config.json: " + key, where,
                  "this generation option is not supported",
                  "say how to choose tokens, for example with --temp 0 or --temp 0.7 --top-p 0.9");
    }
    sampling.notes.push_back(key + " of generation_config.json is not supported and not followed");
  }
  const auto number = [&](const std::optional<double>& wish, const char* key, double fallback,
                          double low, double high, const char* option) {
    return wish ? *wish : number_in(json, key, fallback, low, high, option, where);
  };
  sampling.repetition_penalty =
      number(wishes.repetition_penalty, "repetition_penalty", 1, 0.01, 100, "--repeat-penalty");
  // Without do_sample transformers decodes greedily, whatever the other fields say.
  const auto sampled = [&] {
    return optional_bool(json, "do_sample", false, where + ": generation_config.json");
  };
  if (wishes.temperature || sampled()) {
    sampling.temperature = number(wishes.temperature, "temperature", 1, 0, 100, "--temp");
  }
  if (sampling.temperature == 0) return sampling;
  sampling.top_k = wishes.top_k.value_or(0);
  sampling.top_p = wishes.top_p.value_or(1);
  sampling.min_p = wishes.min_p.value_or(0);
  if ((wishes.top_k && wishes.top_p && wishes.min_p) || !sampled()) return sampling;
  if (!wishes.top_k) {
    // 50 is what transformers uses when the file has no top_k; null turns it off.
    const double fallback = json.find("top_k") == json.end() ? 50 : 0;
    const double value = number_in(json, "top_k", fallback, 0, INT32_MAX, "--top-k", where);
    sampling.top_k = optional_int(json, "top_k", static_cast<int64_t>(value), 0, INT32_MAX,
                                  where + ": generation_config.json");
  }
  sampling.top_p = number(wishes.top_p, "top_p", 1, 0, 1, "--top-p");
  sampling.min_p = number(wishes.min_p, "min_p", 0, 0, 1, "--min-p");
  return sampling;
}

}  // namespace tq
