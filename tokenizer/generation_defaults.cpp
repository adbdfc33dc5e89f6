// generation_defaults - when to stop and how to sample, from the model folder; see chat.h.
#include <algorithm>

#include "model/error.h"
#include "model/json.h"
#include "tokenizer/chat.h"
#include "tokenizer/component.h"

namespace tq {
namespace {

Json parse_object(const std::string& text, const std::string& where) {
  if (text.empty()) return Json::object();
  Json json = parse_json(text, where);
  if (!json.is_object()) throw Error(ErrorKind::kBadData, "top level", where, "must be an object");
  return json;
}

void add_stop(int64_t id, const char* source, const Tokenizer& tokenizer, const std::string& where,
              std::vector<int32_t>& ids) {
  if (id < 0 || id >= tokenizer.size()) {
    throw Error(ErrorKind::kBadData, std::string("eos_token_id in ") + source, where,
                std::to_string(id) + " is no token: there are " + std::to_string(tokenizer.size()));
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
constexpr Neutral kUnsupported[] = {{"repetition_penalty", 1},
                                    {"encoder_repetition_penalty", 1},
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

void refuse_unsupported(const Json& json, const std::string& where) {
  for (const Neutral& key : kUnsupported) {
    const double value = optional_number(json, key.key, key.value, where);
    if (value != key.value) {
      throw Error(ErrorKind::kBadData, std::string("generation_config.json: ") + key.key, where,
                  "this sampling option is not supported", "remove the key");
    }
  }
  for (const char* key : kUnsupportedLists) {
    const Json* value = member(json, key);
    if (value && !(value->is_array() && value->empty())) {
      throw Error(ErrorKind::kBadData, std::string("generation_config.json: ") + key, where,
                  "this generation option is not supported", "remove the key");
    }
  }
}

double number_in(const Json& json, const char* key, double fallback, double low, double high,
                 const std::string& where) {
  const double value = optional_number(json, key, fallback, where);
  if (!(value >= low && value <= high)) {  // also false for NaN
    throw Error(ErrorKind::kBadData, std::string("generation_config.json: ") + key, where,
                "is out of range");
  }
  return value;
}

}  // namespace

std::vector<int32_t> stop_tokens(const ModelTexts& texts, const Config& config,
                                 const Tokenizer& tokenizer, const std::string& where) {
  std::vector<int32_t> ids;
  const Json generation = parse_object(texts.generation_config, where);
  if (const Json* eos = member(generation, "eos_token_id")) {
    if (eos->is_array()) {
      for (const Json& id : *eos) {
        add_stop(id_of_json(id, where), "generation_config.json", tokenizer, where, ids);
      }
    } else {
      add_stop(id_of_json(*eos, where), "generation_config.json", tokenizer, where, ids);
    }
  }
  for (const int32_t id : config.eos_ids) add_stop(id, "config.json", tokenizer, where, ids);
  const Json tokenizer_config = parse_object(texts.tokenizer_config, where);
  if (const Json* eos = member(tokenizer_config, "eos_token")) {
    const std::string text = eos->is_object()
                                 ? require_string(*eos, "content", where)
                                 : require_string(tokenizer_config, "eos_token", where);
    const std::optional<int32_t> id = tokenizer.id_of(text);
    if (!id) {
      throw Error(ErrorKind::kBadData, "eos_token '" + text + "' in tokenizer_config.json", where,
                  "is not a token");
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

SamplingDefaults sampling_defaults(const ModelTexts& texts, const std::string& where) {
  SamplingDefaults defaults;
  const Json json = parse_object(texts.generation_config, where);
  refuse_unsupported(json, where);
  // Without do_sample transformers decodes greedily, whatever the other fields say.
  if (!optional_bool(json, "do_sample", false, where)) return defaults;
  defaults.temperature = number_in(json, "temperature", 1.0, 0, 100, where);
  // 50 is what transformers uses when the file has no top_k.
  defaults.top_k = member(json, "top_k") || json.find("top_k") == json.end()
                       ? optional_int(json, "top_k", 50, 0, INT32_MAX, where)
                       : 0;
  defaults.top_p = number_in(json, "top_p", 1.0, 0, 1, where);
  defaults.min_p = number_in(json, "min_p", 0.0, 0, 1, where);
  return defaults;
}

}  // namespace tq
