// decode - see decode.h.
#include "tokenizer/decode.h"

#include <cctype>
#include <charconv>

#include "tokenizer/component.h"
#include "tokenizer/pretokenize.h"
#include "tokenizer/utf8.h"

namespace tq {
namespace {

// "<0xNN>" as a byte, or -1.
int byte_of_token(std::string_view token) {
  if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return -1;
  int value = -1;
  const char* end = token.data() + 5;
  const auto result = std::from_chars(token.data() + 3, end, value, 16);
  return result.ec == std::errc() && result.ptr == end && value >= 0 ? value : -1;
}

std::string replace_all(std::string_view text, const std::string& from, const std::string& to) {
  std::string out;
  for (size_t at = 0;;) {
    const size_t found = text.find(from, at);
    if (found == std::string_view::npos) return out.append(text.substr(at));
    out.append(text.substr(at, found - at)).append(to);
    at = found + from.size();
  }
}

// A token that has other characters than letters of the byte alphabet stands for itself.
void append_letters(std::string_view token, std::string& out) {
  const size_t before = out.size();
  for (size_t i = 0; i < token.size();) {
    const Utf8Unit unit = utf8_at(token, i);
    const int byte = letter_to_byte(unit.code);
    if (byte < 0) {
      out.resize(before);
      out.append(token);
      return;
    }
    out += static_cast<char>(byte);
    i += unit.length;
  }
}

}  // namespace

Decoder Decoder::from_json(const Json* json, const std::string& where) {
  Decoder decoder;
  decoder.where_ = where;
  if (!json) return decoder;
  Stage stage = Stage::kReplace;
  const std::string type = type_of(*json, "decoder", where);
  if (type == "ByteLevel") {
    // All three fields belong to the pre-tokenizer and the offsets.
    check_keys(*json, {"type", "add_prefix_space", "trim_offsets", "use_regex"}, "ByteLevel",
               where);
    decoder.kind_ = Kind::kByteLevel;
  } else if (type == "Metaspace") {
    const MetaspaceOptions options = metaspace_options(*json, where);
    decoder.kind_ = Kind::kMetaspace;
    decoder.replacements_.push_back({options.replacement, " "});
    decoder.drop_first_marks_ = options.scheme != "never";
  } else {
    decoder.kind_ = Kind::kChain;
    for_each_step(
        *json, "decoder", "decoders", where,
        [&](const Json& step, const std::string& kind) { decoder.add(step, kind, stage); });
  }
  // Without Fuse the reference strips each token, not the text.
  if (decoder.strip_count_ > 0 && !decoder.fuse_) {
    bad_tokenizer("decoder Strip", where, "is supported after Fuse only");
  }
  return decoder;
}

void Decoder::enter(Stage next, Stage& stage, const std::string& type) const {
  if (next < stage || (next == stage && next != Stage::kReplace && next != Stage::kByteFallback)) {
    bad_tokenizer("decoder " + type, where_,
                  "the supported order is Replace, ByteFallback, Fuse, Strip");
  }
  stage = next;
}

void Decoder::add(const Json& json, const std::string& type, Stage& stage) {
  if (type == "Replace") {
    enter(Stage::kReplace, stage, type);
    check_keys(json, {"type", "pattern", "content"}, "decoder Replace", where_);
    const Json& pattern = require(json, "pattern", where_);
    check_keys(pattern, {"String"}, "decoder Replace pattern", where_);
    const std::string from = require_string(pattern, "String", where_);
    const std::string to = require_string(json, "content", where_);
    if (from.empty()) bad_tokenizer("decoder Replace", where_, "the pattern is empty");
    // Bounds what a hostile file can blow a token up to.
    if (to.size() > 64 || replacements_.size() >= 4) {
      bad_tokenizer("decoder Replace", where_, "too long or too many replacements");
    }
    replacements_.push_back({from, to});
  } else if (type == "ByteFallback") {
    enter(Stage::kByteFallback, stage, type);
    check_keys(json, {"type"}, "decoder ByteFallback", where_);
    byte_fallback_ = true;
  } else if (type == "Fuse") {
    enter(Stage::kFuse, stage, type);
    check_keys(json, {"type"}, "decoder Fuse", where_);
    fuse_ = true;
  } else if (type == "Strip") {
    enter(Stage::kStrip, stage, type);
    check_keys(json, {"type", "content", "start", "stop"}, "decoder Strip", where_);
    strip_ = require_string(json, "content", where_);
    if (strip_.empty() || utf8_at(strip_, 0).length != strip_.size()) {
      bad_tokenizer("decoder Strip content", where_, "must be one character");
    }
    strip_count_ = require_int(json, "start", 0, INT32_MAX, where_);
    if (require_int(json, "stop", 0, INT32_MAX, where_) != 0) {
      bad_tokenizer("decoder Strip stop", where_, "only 0 is supported");
    }
  } else {
    bad_tokenizer("unsupported decoder '" + type + "'", where_,
                  "known: ByteLevel, Metaspace, Sequence of Replace, ByteFallback, Fuse, Strip");
  }
}

void Decoder::strip(std::string_view text, DecodeState& state, std::string& out) const {
  if (state.strip_left < 0) state.strip_left = strip_count_;
  while (state.strip_left > 0 && !text.empty()) {
    if (text.substr(0, strip_.size()) != strip_) {
      state.strip_left = 0;
    } else {
      text.remove_prefix(strip_.size());
      --state.strip_left;
    }
  }
  out.append(text);
}

void Decoder::append_added(std::string_view content, std::string_view normalized,
                           DecodeState& state, std::string& out) const {
  const bool first = state.first;
  state.first = false;
  if (kind_ == Kind::kJoin && !first) out += ' ';
  // Only these decoders undo a normalizer that writes spaces as a character.
  if (content == normalized || (kind_ != Kind::kChain && kind_ != Kind::kMetaspace)) {
    state.strip_left = 0;
    out.append(content);
    return;
  }
  std::string text(normalized);
  for (const auto& [from, to] : replacements_) text = replace_all(text, from, to);
  if (kind_ == Kind::kMetaspace) {
    const bool drop = first && drop_first_marks_ && text.starts_with(' ');
    out.append(text, drop ? 1 : 0);
    return;
  }
  strip(text, state, out);
}

void Decoder::append(std::string_view token, DecodeState& state, std::string& out) const {
  const bool first = state.first;
  state.first = false;
  switch (kind_) {
    case Kind::kJoin:
      if (!first) out += ' ';
      out.append(token);
      return;
    case Kind::kByteLevel:
      return append_letters(token, out);
    case Kind::kMetaspace:
      out += replace_all(token, replacements_[0].first, first && drop_first_marks_ ? "" : " ");
      return;
    case Kind::kChain:
      break;
  }
  std::string text(token);
  for (const auto& [from, to] : replacements_) text = replace_all(text, from, to);
  if (byte_fallback_) {
    if (const int byte = byte_of_token(text); byte >= 0) {
      text.assign(1, static_cast<char>(byte));
    }
  }
  strip(text, state, out);
}

}  // namespace tq
