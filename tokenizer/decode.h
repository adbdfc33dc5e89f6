// decode - the "decoder" of tokenizer.json: token strings back to bytes.
//
// Accepted are ByteLevel, Metaspace, none (tokens joined by spaces), and the SentencePiece chain
// Replace, ByteFallback, Fuse, Strip in this order: those that can run token by token, which
// streaming needs. Unlike the reference, broken UTF-8 stays as bytes here; whoever prints decides.
// Read next: stream.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model/json.h"
#include "tokenizer/tokenizer.h"

namespace tq {

class Decoder {
 public:
  /// `json` may be null. Throws Error(kBadData) naming the unsupported part.
  static Decoder from_json(const Json* json, const std::string& where);

  /// Appends the bytes of the next token, given as its vocabulary string.
  void append(std::string_view token, DecodeState& state, std::string& out) const;
  /// The same for an added token, whose content is text. `normalized`: its form in normalized text,
  /// where that is what it stands for ("\u2581word" for "word").
  void append_added(std::string_view content, std::string_view normalized, DecodeState& state,
                    std::string& out) const;

 private:
  enum class Kind { kJoin, kByteLevel, kMetaspace, kChain };
  // Stages of the chain, in the only order accepted.
  enum class Stage { kReplace, kByteFallback, kFuse, kStrip };
  void add(const Json& json, const std::string& type, Stage& stage);
  void enter(Stage next, Stage& stage, const std::string& type) const;
  void strip(std::string_view text, DecodeState& state, std::string& out) const;

  Kind kind_ = Kind::kJoin;
  std::vector<std::pair<std::string, std::string>> replacements_;  // from, to
  bool byte_fallback_ = false, fuse_ = false;
  std::string strip_;  // the character to strip at the start
  int64_t strip_count_ = 0;
  bool drop_first_marks_ = false;  // Metaspace: unless prepend_scheme is "never"
  std::string where_;
};

}  // namespace tq
