// bpe - vocabulary and merge loop of byte-pair encoding.
//
// A piece (from pretokenize.h) starts as single symbols: bytes in the GPT-2 alphabet, or
// characters with byte fallback (SentencePiece style). Then the adjacent pair of the lowest rank
// is merged until no pair has a rank. n log n with a heap, so that a "word" of a megabyte is fine.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "model/json.h"
#include "tokenizer/added_tokens.h"

namespace tq {

/// The two long lists of "model", taken from the parser entry by entry: as JSON values they would
/// need twenty times the memory of their text.
class BpeLists {
 public:
  explicit BpeLists(const std::string& where) : where_(where) {}
  /// The streams for parse_json(); they refer to this object. "model" keeps the rest.
  std::vector<JsonStream> streams();

 private:
  friend class Bpe;
  struct Entry {
    std::string text;
    int32_t id;
  };
  void add_entry(const std::string& text, const Json& id);
  void add_merge(const Json& merge);
  std::vector<Entry> vocab_;
  std::string merges_;  // both tokens of each, kEndOfToken behind every one
  int64_t n_merges_ = 0;
  std::string where_;
};

class Bpe {
 public:
  /// Parses "model". byte_level: pieces come as bytes, written in the GPT-2 alphabet in the file.
  /// `added` names the tokens that need no merges. Throws Error(kBadData).
  Bpe(Bpe&&) = default;  // no copies: ids_ views strings_
  Bpe& operator=(Bpe&&) = default;
  static Bpe from_json(const Json& model, BpeLists lists, bool byte_level,
                       const std::vector<AddedToken>& added, const std::string& where);

  /// Strings by id; ids without a vocabulary entry have an empty string and has(id) is false.
  const std::vector<std::string>& strings() const { return strings_; }
  /// Id of a vocabulary string, or -1.
  int32_t id_of(std::string_view text) const;
  /// Whether encode() can yield this id of the vocabulary.
  bool can_make(int32_t id) const;
  int64_t n_vocab() const { return static_cast<int64_t>(ids_.size()); }
  int64_t n_merges() const { return n_merges_; }
  bool byte_fallback() const { return byte_fallback_; }
  const std::string& unk() const { return unk_token_; }

  /// Working memory of one encode call.
  struct Scratch {
    struct Symbol {
      int32_t id, previous, next;
    };
    struct Cached {
      size_t begin, count;
    };
    struct Hash {
      using is_transparent = void;
      size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
    };
    std::vector<Symbol> symbols;
    std::vector<uint64_t> heap;  // rank << 32 | position of the left symbol
    std::unordered_map<std::string, Cached, Hash, std::equal_to<>> cache;
    std::vector<int32_t> cached_ids;
  };
  /// Appends the ids of one piece.
  void encode(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const;

 private:
  struct Merge {
    int32_t right, rank, merged;
  };
  Bpe() = default;
  int32_t whole_piece(std::string_view piece) const;
  void read_vocab(std::vector<BpeLists::Entry> entries, size_t n_added);
  void read_merges(const std::string& texts, int64_t count);
  void require_merges(const std::vector<AddedToken>& added) const;
  void make_byte_table();
  void make_inner_pairs();
  const Merge* find_merge(int32_t left, int32_t right) const;
  size_t find_cut(std::string_view text) const;
  void encode_stretch(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const;
  void encode_uncached(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const;
  void byte_symbols(std::string_view piece, std::vector<int32_t>& ids) const;
  void char_symbols(std::string_view piece, std::vector<int32_t>& ids) const;
  void merge_symbols(const std::vector<int32_t>& start, Scratch& scratch,
                     std::vector<int32_t>& ids) const;

  std::string where_;
  std::vector<std::string> strings_;
  std::unordered_map<std::string_view, int32_t> ids_;  // views of strings_
  // Merges of each left symbol: merges_[first_merge_[left] .. first_merge_[left + 1]), sorted by
  // the right symbol. No hashing: a hostile file cannot make the look-up slow.
  std::vector<int64_t> first_merge_;
  std::vector<Merge> merges_;
  // Pairs of characters (first << 32 | second) that stand side by side in some merged token,
  // sorted. No merge crosses any other pair: text without a pre-tokenizer is cut there.
  std::vector<uint64_t> inner_pairs_;
  bool can_cut_ = false;
  std::vector<int32_t> byte_id_;  // [256] id of a byte's letter (or <0xNN>), or -1
  int64_t n_merges_ = 0;
  int32_t unk_ = -1;
  std::string unk_token_;
  bool byte_level_ = false, byte_fallback_ = false, fuse_unk_ = false, ignore_merges_ = false;
};

}  // namespace tq
