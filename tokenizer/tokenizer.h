// tokenizer - text <-> token ids, exactly as Hugging Face's tokenizer.json says.
//
// Byte-level BPE (Llama-3, Qwen3, SmolLM2) and SentencePiece-style BPE with byte fallback
// (Llama-2 family). Pipeline: added tokens are cut out -> normalizer -> pre-tokenizer -> BPE merge
// loop -> post-processor. Any part we do not implement is an error that names it, never a silent
// approximation. Read next: bpe.cpp (merge loop), pretokenize.cpp (PCRE2), chat.h (templates).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "model/weights.h"

namespace tq {

/// What decoding remembers between tokens (decode.h).
struct DecodeState {
  bool first = true;        // no token yet
  int64_t strip_left = -1;  // characters that Strip may still remove; -1 = all of them
};

class Tokenizer {
 public:
  /// Parses tokenizer.json. Throws Error(kBadData) naming the unsupported or broken part.
  static Tokenizer from_json(const std::string& json_text, const std::string& where);
  /// The tokenizer of a model: tokenizer.json, and what tokenizer_config.json adds to it
  /// (config_tokens.h). `source` names the model in errors.
  static Tokenizer from_texts(const ModelTexts& texts, const std::string& source);
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  /// Highest id + 1, over vocabulary and added tokens.
  int64_t size() const;
  /// Ids of `text` (valid UTF-8, else Error(kBadData)).
  /// add_special: apply the post-processor (Llama-3 prepends <|begin_of_text|>).
  /// Added tokens written in the text become their ids, as with Hugging Face. Without
  /// parse_special, special ones are ordinary text (split_special_tokens; what `run` does with
  /// user text).
  std::vector<int32_t> encode(std::string_view text, bool add_special, bool parse_special) const;
  /// Bytes of a token sequence, by the decoder of tokenizer.json. May end inside a UTF-8 sequence,
  /// and a model may emit bytes that are no UTF-8 at all: see replace_invalid_utf8().
  /// Throws Error(kBadData) for an id outside [0, size()), here and below.
  std::string decode(std::span<const int32_t> ids, bool skip_special) const;
  /// The vocabulary string of a token as written in tokenizer.json ("Ġthe", "▁the", "<0x0A>").
  const std::string& piece(int32_t id) const;
  std::optional<int32_t> id_of(std::string_view piece) const;
  bool is_special(int32_t id) const;
  /// What a user should know about the files, a sentence each.
  const std::vector<std::string>& notes() const;
  /// Short description for `inspect`, for example "byte-level BPE, 49152 tokens, 48900 merges".
  std::string describe() const;

 private:
  friend class StreamDecoder;
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  void append_decoded(int32_t id, bool skip_special, DecodeState& state, std::string& out) const;
  std::unique_ptr<Impl> impl_;
};

/// Decodes a stream token by token; an incomplete UTF-8 tail is held back until it is complete.
/// All outputs together are replace_invalid_utf8(decode(ids)): what it returns is always valid.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special);
  std::string next(int32_t id);
  /// The held-back rest, invalid bytes replaced by U+FFFD.
  std::string finish();

 private:
  const Tokenizer& tokenizer_;
  bool skip_special_;
  DecodeState state_;
  std::string pending_;
};

/// True if `text` is valid UTF-8 (no surrogates, no overlong forms).
bool is_valid_utf8(std::string_view text);

/// Each broken sequence becomes U+FFFD (one per "maximal subpart", as Unicode recommends and Rust
/// and Python do).
std::string replace_invalid_utf8(std::string_view text);

}  // namespace tq
