// post_process - see post_process.h.
#include "tokenizer/post_process.h"

#include "tokenizer/component.h"

namespace tq {
namespace {

class Reader {
 public:
  Reader(PostProcessor& out, int64_t n_ids, const std::string& where)
      : out_(out), n_ids_(n_ids), where_(where) {}

  void add(const Json& json, const std::string& type) {
    if (type == "ByteLevel") {
      check_keys(json, {"type", "add_prefix_space", "trim_offsets", "use_regex"}, "ByteLevel",
                 where_);
    } else if (type == "TemplateProcessing") {
      add_template(json);
    } else {
      bad_tokenizer("unsupported post_processor '" + type + "'", where_,
                    "known: TemplateProcessing, ByteLevel, Sequence");
    }
  }

 private:
  void add_template(const Json& json) {
    check_keys(json, {"type", "single", "pair", "special_tokens"}, "TemplateProcessing", where_);
    const Json& single = require(json, "single", where_);
    const Json& specials = require(json, "special_tokens", where_);
    if (!single.is_array()) bad_tokenizer("TemplateProcessing single", where_, "must be a list");
    bool seen_text = false;
    std::vector<int32_t> before, after;
    for (const Json& piece : single) {
      check_keys(piece, {"SpecialToken", "Sequence"}, "TemplateProcessing piece", where_);
      if (const Json* sequence = member(piece, "Sequence")) {
        const std::string id = require_string(*sequence, "id", where_);
        if (id != "A" || seen_text) {
          bad_tokenizer("TemplateProcessing single", where_, "must hold the text A exactly once");
        }
        seen_text = true;
      } else {
        add_special(require(piece, "SpecialToken", where_), specials, seen_text ? after : before);
      }
    }
    if (!seen_text) {
      bad_tokenizer("TemplateProcessing single", where_, "must hold the text A exactly once");
    }
    // A later processor wraps what the earlier ones made.
    out_.before.insert(out_.before.begin(), before.begin(), before.end());
    out_.after.insert(out_.after.end(), after.begin(), after.end());
    if (out_.before.size() + out_.after.size() > 64) {
      bad_tokenizer("TemplateProcessing", where_, "adds more than 64 tokens");
    }
  }

  void add_special(const Json& piece, const Json& specials, std::vector<int32_t>& ids) {
    const std::string name = require_string(piece, "id", where_);
    if (!specials.is_object()) bad_tokenizer("special_tokens", where_, "must be an object");
    const auto found = specials.find(name);
    if (found == specials.end()) {
      bad_tokenizer("TemplateProcessing", where_, "'" + name + "' is not in special_tokens");
    }
    check_keys(*found, {"id", "ids", "tokens"}, "special_tokens entry", where_);
    const Json& list = require(*found, "ids", where_);
    if (!list.is_array()) bad_tokenizer("special_tokens ids", where_, "must be a list");
    for (const Json& id : list) {
      if (!id.is_number_unsigned() || id.get<uint64_t>() >= static_cast<uint64_t>(n_ids_)) {
        bad_tokenizer("special_tokens ids of '" + name + "'", where_,
                      "must be token ids below " + std::to_string(n_ids_));
      }
      ids.push_back(id.get<int32_t>());
    }
  }

  PostProcessor& out_;
  int64_t n_ids_;
  const std::string& where_;
};

}  // namespace

PostProcessor PostProcessor::from_json(const Json* json, int64_t n_ids, const std::string& where) {
  PostProcessor result;
  if (!json) return result;
  Reader reader(result, n_ids, where);
  for_each_step(*json, "post_processor", "processors", where,
                [&](const Json& step, const std::string& type) { reader.add(step, type); });
  return result;
}

}  // namespace tq
