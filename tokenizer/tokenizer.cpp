// tokenizer - puts the parts together; see tokenizer.h for the pipeline.
#include "tokenizer/tokenizer.h"

#include <algorithm>
#include <deque>
#include <unordered_map>

#include "model/error.h"
#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/component.h"
#include "tokenizer/config_tokens.h"
#include "tokenizer/decode.h"
#include "tokenizer/normalize.h"
#include "tokenizer/post_process.h"
#include "tokenizer/pretokenize.h"

namespace tq {

struct Tokenizer::Impl {
  std::string where;
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  std::vector<AddedToken> added;
  Bpe bpe;
  TokenFinder raw_finder, normalized_finder;
  Decoder decoder;
  PostProcessor post_processor;
  std::vector<std::string> pieces;  // by id
  std::vector<bool> special;        // by id
  std::unordered_map<std::string, int32_t> added_ids;
  // By id: added tokens that stand for their own text, not for a string of the vocabulary that BPE
  // makes as well; and the normalized forms of those whose normalizer changes them.
  std::vector<bool> is_text;
  std::unordered_map<int32_t, std::string> forms;
  std::vector<std::string> notes;

  static std::unique_ptr<Impl> read(const std::string& text, const std::string& where,
                                    const Json& config, const std::string& config_where);
  void number_ids();
  void note_texts();
  void check_id(int32_t id) const;
};

namespace {

// Working memory of one encode call.
struct EncodeScratch {
  explicit EncodeScratch(size_t text_bytes) : regex(text_bytes) {}
  RegexScratch regex;
  Bpe::Scratch bpe;
  std::deque<std::string> owned;
  std::vector<std::string_view> pieces;
};

}  // namespace

std::unique_ptr<Tokenizer::Impl> Tokenizer::Impl::read(const std::string& text,
                                                       const std::string& where, const Json& config,
                                                       const std::string& config_where) {
  BpeLists lists(where);
  AddedTokenList list(where);
  std::vector<JsonStream> streams = lists.streams();
  streams.push_back(list.stream());
  const Json json = parse_json(text, where, streams);
  // truncation and padding describe batches of the training library; encode() does neither.
  check_keys(json,
             {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
              "post_processor", "decoder", "model"},
             "tokenizer", where);
  if (member(json, "version") && require_string(json, "version", where) != "1.0") {
    bad_tokenizer("tokenizer version", where, "only 1.0 is known");
  }
  auto normalizer = Normalizer::from_json(member(json, "normalizer"), where);
  auto pre_tokenizer = PreTokenizer::from_json(member(json, "pre_tokenizer"), where);
  if (const Json* tokens = member(json, "added_tokens"); tokens && !tokens->is_array()) {
    bad_tokenizer("added_tokens", where, "must be a list");
  }
  auto added = list.take();
  auto bpe = Bpe::from_json(require(json, "model", where), std::move(lists),
                            pre_tokenizer.byte_level(), added, where);
  int32_t next_id = static_cast<int32_t>(bpe.strings().size());
  for (const AddedToken& token : added) next_id = std::max(next_id, token.id + 1);
  add_config_tokens(config, bpe, next_id, added, config_where);
  TokenFinder raw(added, false, normalizer), normalized(added, true, normalizer);
  auto impl = std::unique_ptr<Impl>(new Impl{where,
                                             std::move(normalizer),
                                             std::move(pre_tokenizer),
                                             std::move(added),
                                             std::move(bpe),
                                             std::move(raw),
                                             std::move(normalized),
                                             Decoder::from_json(member(json, "decoder"), where),
                                             {},
                                             {},
                                             {},
                                             {},
                                             {},
                                             {},
                                             {}});
  impl->number_ids();
  impl->note_texts();
  impl->post_processor = PostProcessor::from_json(member(json, "post_processor"),
                                                  static_cast<int64_t>(impl->pieces.size()), where);
  const std::string note = post_processor_note(config, impl->post_processor, impl->added);
  if (!note.empty()) impl->notes.push_back(note);
  return impl;
}

// Ids of vocabulary and added tokens must agree and have no gap: the model's rows are ids.
void Tokenizer::Impl::number_ids() {
  size_t size = bpe.strings().size();
  for (const AddedToken& token : added) size = std::max(size, static_cast<size_t>(token.id) + 1);
  const size_t entries = static_cast<size_t>(bpe.n_vocab()) + added.size();
  if (size > entries) {
    bad_tokenizer("token ids", where,
                  "the highest is " + std::to_string(size - 1) + " but there are at most " +
                      std::to_string(entries) + " tokens: there is a gap");
  }
  pieces = bpe.strings();
  pieces.resize(size);
  special.assign(size, false);
  std::vector<bool> used(size, false);
  for (size_t id = 0; id < bpe.strings().size(); ++id) {
    used[id] = bpe.id_of(pieces[id]) == static_cast<int32_t>(id);
  }
  for (const AddedToken& token : added) {
    const auto id = static_cast<size_t>(token.id);
    const int32_t in_vocab = bpe.id_of(token.content);
    if (in_vocab >= 0 && in_vocab != token.id) {
      bad_tokenizer(
          "added token '" + token.content + "'", where,
          "has id " + std::to_string(id) + ", in vocab it is " + std::to_string(in_vocab));
    }
    if (used[id] && in_vocab < 0) {
      bad_tokenizer("added token '" + token.content + "'", where,
                    "has id " + std::to_string(id) + ", which in vocab is '" + pieces[id] + "'");
    }
    used[id] = true;
    pieces[id] = token.content;
    special[id] = token.special;
    added_ids.emplace(token.content, token.id);
  }
  const auto gap = std::find(used.begin(), used.end(), false);
  if (gap != used.end()) {
    bad_tokenizer("token id " + std::to_string(gap - used.begin()), where,
                  "is not used: there is a gap");
  }
}

void Tokenizer::Impl::note_texts() {
  is_text.assign(pieces.size(), false);
  for (const AddedToken& token : added) {
    if (bpe.id_of(token.content) >= 0 && bpe.can_make(token.id)) continue;
    is_text[static_cast<size_t>(token.id)] = true;
    if (!token.normalized || normalizer.empty()) continue;
    RegexScratch scratch(token.content.size());
    std::string form = normalizer.apply(token.content, scratch);
    if (form != token.content) forms.emplace(token.id, std::move(form));
  }
}

void Tokenizer::Impl::check_id(int32_t id) const {
  if (id < 0 || static_cast<size_t>(id) >= pieces.size()) {
    throw Error(ErrorKind::kBadData, "token id " + std::to_string(id), where,
                "the tokenizer has " + std::to_string(pieces.size()) + " tokens");
  }
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::from_json(const std::string& json_text, const std::string& where) {
  return Tokenizer(Impl::read(json_text, where, Json::object(), ""));
}

Tokenizer Tokenizer::from_texts(const ModelTexts& texts, const std::string& source) {
  const std::string where = source + ": tokenizer.json";
  const std::string config_where = source + ": tokenizer_config.json";
  Json config = Json::object();
  if (!texts.tokenizer_config.empty()) config = parse_json(texts.tokenizer_config, config_where);
  if (!config.is_object()) bad_tokenizer("top level", config_where, "must be an object");
  return Tokenizer(Impl::read(texts.tokenizer, where, config, config_where));
}

int64_t Tokenizer::size() const {
  return static_cast<int64_t>(impl_->pieces.size());
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special,
                                       bool parse_special) const {
  if (!is_valid_utf8(text)) {
    throw Error(ErrorKind::kBadData, "text to tokenize", "", "is not valid UTF-8");
  }
  const Impl& impl = *impl_;
  EncodeScratch scratch(text.size());
  std::vector<int32_t> ids;
  if (add_special) ids = impl.post_processor.before;

  std::vector<Segment> raw, rest;
  impl.raw_finder.split(text, parse_special, scratch.regex, raw);
  for (size_t i = 0; i < raw.size(); ++i) {
    if (raw[i].id >= 0) {
      ids.push_back(raw[i].id);
      continue;
    }
    std::string normalized;
    std::string_view stretch = raw[i].text;
    if (!impl.normalizer.empty()) {
      normalized = impl.normalizer.apply(stretch, scratch.regex);
      stretch = normalized;
    }
    rest.clear();
    impl.normalized_finder.split(stretch, parse_special, scratch.regex, rest);
    for (size_t j = 0; j < rest.size(); ++j) {
      if (rest[j].id >= 0) {
        ids.push_back(rest[j].id);
        continue;
      }
      scratch.owned.clear();
      impl.pre_tokenizer.split(rest[j].text, i == 0 && j == 0, scratch.regex, scratch.owned,
                               scratch.pieces);
      for (const std::string_view piece : scratch.pieces) impl.bpe.encode(piece, scratch.bpe, ids);
    }
  }
  if (add_special) {
    ids.insert(ids.end(), impl.post_processor.after.begin(), impl.post_processor.after.end());
  }
  return ids;
}

void Tokenizer::append_decoded(int32_t id, bool skip_special, DecodeState& state,
                               std::string& out) const {
  impl_->check_id(id);
  const auto index = static_cast<size_t>(id);
  if (skip_special && impl_->special[index]) return;
  const std::string& piece = impl_->pieces[index];
  if (!impl_->is_text[index]) return impl_->decoder.append(piece, state, out);
  const auto form = impl_->forms.find(id);
  impl_->decoder.append_added(piece, form == impl_->forms.end() ? piece : form->second, state, out);
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string out;
  DecodeState state;
  for (const int32_t id : ids) append_decoded(id, skip_special, state, out);
  return out;
}

const std::string& Tokenizer::piece(int32_t id) const {
  impl_->check_id(id);
  return impl_->pieces[static_cast<size_t>(id)];
}

std::optional<int32_t> Tokenizer::id_of(std::string_view piece) const {
  if (const auto found = impl_->added_ids.find(std::string(piece));
      found != impl_->added_ids.end()) {
    return found->second;
  }
  const int32_t id = impl_->bpe.id_of(piece);
  return id < 0 ? std::nullopt : std::optional<int32_t>(id);
}

bool Tokenizer::is_special(int32_t id) const {
  impl_->check_id(id);
  return impl_->special[static_cast<size_t>(id)];
}

const std::vector<std::string>& Tokenizer::notes() const {
  return impl_->notes;
}

std::string Tokenizer::describe() const {
  const char* kind = impl_->pre_tokenizer.byte_level() ? "byte-level BPE"
                     : impl_->bpe.byte_fallback()      ? "BPE with byte fallback"
                                                       : "character BPE";
  return std::string(kind) + ", " + std::to_string(size()) + " tokens, " +
         std::to_string(impl_->bpe.n_merges()) + " merges";
}

}  // namespace tq
