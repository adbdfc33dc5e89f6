// config_tokens - see config_tokens.h. Follows TokenizersBackend.__init__ of transformers 5.24,
// which PreTrainedTokenizerFast of 4.57 agrees with.
#include "tokenizer/config_tokens.h"

#include <algorithm>
#include <charconv>
#include <unordered_map>

#include "tokenizer/component.h"

namespace tq {
namespace {

constexpr const char* kNamed[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                  "pad_token", "cls_token", "mask_token"};
constexpr const char* kExtra[] = {"additional_special_tokens", "extra_special_tokens"};

bool is_named(std::string_view key) {
  return std::find(std::begin(kNamed), std::end(kNamed), key) != std::end(kNamed);
}

class ConfigTokens {
 public:
  ConfigTokens(const Bpe& bpe, int32_t next_id, std::vector<AddedToken>& added,
               const std::string& where)
      : bpe_(bpe), next_id_(next_id), added_(added), where_(where) {
    for (size_t i = 0; i < added.size(); ++i) index_.emplace(added[i].content, i);
  }

  // Flags and ids are written out here; the named tokens repeat some of them.
  void add_decoder(const Json& decoder, const Json& config) {
    if (!decoder.is_object()) bad_tokenizer("added_tokens_decoder", where_, "must be an object");
    std::vector<AddedToken> declared;
    for (const auto& item : decoder.items()) {
      AddedToken token = read_added_token(item.value(), where_);
      const std::string& key = item.key();
      const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), token.id);
      if (error != std::errc() || end != key.data() + key.size() || token.id < 0) {
        bad_tokenizer("added_tokens_decoder", where_, "'" + key + "' is no token id");
      }
      declared.push_back(std::move(token));
    }
    std::sort(declared.begin(), declared.end(),
              [](const AddedToken& a, const AddedToken& b) { return a.id < b.id; });
    for (AddedToken& token : declared) {
      const AddedToken* known = find(token.content);
      if (known && known->id == token.id && known->same_flags(token)) continue;
      token.special = token.special || is_value_of_name(config, token.content);
      const int32_t actual = put(token);
      if (actual == token.id) continue;
      bad_tokenizer("token '" + token.content + "' of added_tokens_decoder", where_,
                    "has id " + std::to_string(token.id) + " there, but " + std::to_string(actual) +
                        " by tokenizer.json");
    }
  }

  // A token that is known keeps its flags.
  void add_special(const Json& value) {
    if (value.is_string() && value.get_ref<const std::string&>().empty()) return;  // is none
    AddedToken token = read_added_token(
        value.is_string() ? Json{{"content", value}, {"special", true}} : value, where_);
    token.special = true;
    if (!find(token.content)) put(std::move(token));
  }

 private:
  AddedToken* find(const std::string& content) {
    const auto found = index_.find(content);
    return found == index_.end() ? nullptr : &added_[found->second];
  }

  // Adds a token, or gives it other flags; returns its id. Special it stays.
  int32_t put(AddedToken token) {
    if (AddedToken* known = find(token.content)) {
      token.id = known->id;
      token.special = token.special || known->special;
      *known = std::move(token);
      return known->id;
    }
    const int32_t in_vocab = bpe_.id_of(token.content);
    token.id = in_vocab >= 0 ? in_vocab : next_id_++;
    index_.emplace(token.content, added_.size());
    added_.push_back(std::move(token));
    return added_.back().id;
  }

  static bool is_value_of_name(const Json& config, const std::string& content) {
    return std::any_of(std::begin(kNamed), std::end(kNamed), [&](const char* key) {
      const Json* value = member(config, key);
      if (value && value->is_object()) value = member(*value, "content");
      return value && value->is_string() && value->get_ref<const std::string&>() == content;
    });
  }

  const Bpe& bpe_;
  int32_t next_id_;
  std::vector<AddedToken>& added_;
  std::unordered_map<std::string, size_t> index_;  // of the contents in added_
  const std::string& where_;
};

}  // namespace

void add_config_tokens(const Json& config, const Bpe& bpe, int32_t next_id,
                       std::vector<AddedToken>& added, const std::string& where) {
  ConfigTokens tokens(bpe, next_id, added, where);
  if (const Json* decoder = member(config, "added_tokens_decoder")) {
    tokens.add_decoder(*decoder, config);
  }
  for (const char* key : kNamed) {
    if (const Json* value = member(config, key)) tokens.add_special(*value);
  }
  // Names that a model makes up ("image_token"), as transformers 5 takes them.
  for (const auto& item : config.items()) {
    if (item.key().ends_with("_token") && !is_named(item.key()) && item.value().is_string()) {
      tokens.add_special(item.value());
    }
  }
  for (const char* key : kExtra) {
    const Json* list = member(config, key);
    if (!list) continue;
    if (!list->is_array() && !list->is_object()) {
      bad_tokenizer(key, where, "must be a list or an object of tokens");
    }
    for (const Json& value : *list) tokens.add_special(value);
  }
}

std::string post_processor_note(const Json& config, const PostProcessor& processor,
                                const std::vector<AddedToken>& added) {
  const Json* name = member(config, "tokenizer_class");
  if (!name || (*name != "LlamaTokenizer" && *name != "LlamaTokenizerFast")) return "";
  const auto wanted = [&](const char* flag, bool fallback, const char* token) {
    const Json* value = member(config, flag);
    std::vector<int32_t> ids;
    if (!(value && value->is_boolean() ? value->get<bool>() : fallback)) return ids;
    const Json* content = member(config, token);
    if (content && content->is_object()) content = member(*content, "content");
    for (const AddedToken& known : added) {
      if (content && *content == known.content) ids.push_back(known.id);
    }
    return ids;
  };
  const bool before = wanted("add_bos_token", true, "bos_token") == processor.before;
  const bool after = wanted("add_eos_token", false, "eos_token") == processor.after;
  if (before && after) return "";
  return std::string(before ? "add_eos_token" : "add_bos_token") +
         " of tokenizer_config.json and the post_processor of tokenizer.json disagree about the "
         "tokens around a text; the latter counts, as in transformers 5";
}

}  // namespace tq
