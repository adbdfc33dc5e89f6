// bpe - see bpe.h. Reading the vocabulary and the merges first, then the merge loop.
#include "tokenizer/bpe.h"

#include <algorithm>
#include <functional>
#include <tuple>
#include <unordered_set>

#include "tokenizer/component.h"
#include "tokenizer/pretokenize.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/utf8.h"

namespace tq {
namespace {

// Longer pieces are rarely met twice; more entries than this do not pay either.
constexpr size_t kMaxCachedBytes = 48;
constexpr size_t kMaxCacheEntries = 1 << 17;

constexpr char kEndOfToken = '\xFF';  // in no UTF-8 text

std::string byte_token(unsigned byte) {
  static constexpr char kHex[] = "0123456789ABCDEF";
  return std::string("<0x") + kHex[byte >> 4] + kHex[byte & 15] + ">";
}

size_t count_chars(std::string_view text) {
  size_t n = 0;
  for (size_t i = 0; i < text.size(); i += utf8_at(text, i).length) ++n;
  return n;
}

// The bytes that a string of letters stands for; false if it has other characters.
bool letters_to_bytes(std::string_view text, std::string& bytes) {
  bytes.clear();
  for (size_t i = 0; i < text.size();) {
    const Utf8Unit unit = utf8_at(text, i);
    const int byte = letter_to_byte(unit.code);
    if (byte < 0) return false;
    bytes += static_cast<char>(byte);
    i += unit.length;
  }
  return true;
}

}  // namespace

std::vector<JsonStream> BpeLists::streams() {
  return {{{"model", "vocab"}, [this](const std::string& text, Json&& id) { add_entry(text, id); }},
          {{"model", "merges"}, [this](const std::string&, Json&& merge) { add_merge(merge); }}};
}

void BpeLists::add_entry(const std::string& text, const Json& id) {
  if (!id.is_number_unsigned() || id.get<uint64_t>() >= INT32_MAX) {
    bad_tokenizer("id of vocab entry '" + text + "'", where_, "must be an integer below 2^31");
  }
  if (vocab_.size() == kMaxTokens) too_many_tokens(where_);
  vocab_.push_back({text, id.get<int32_t>()});
}

void BpeLists::add_merge(const Json& merge) {
  const auto bad = [&](const std::string& why) {
    bad_tokenizer("merge " + std::to_string(n_merges_), where_, why);
  };
  if (merge.is_string()) {  // "a b"
    const std::string& text = merge.get_ref<const std::string&>();
    const size_t space = text.find(' ');
    if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
      bad("must be two tokens with one space between them");
    }
    merges_.append(text, 0, space) += kEndOfToken;
    merges_.append(text, space + 1) += kEndOfToken;
  } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
             merge[1].is_string()) {  // ["a", "b"]
    for (const Json& token : merge)
      merges_.append(token.get_ref<const std::string&>()) += kEndOfToken;
  } else {
    bad("must be a string or a pair of strings");
  }
  ++n_merges_;
}

Bpe Bpe::from_json(const Json& model, BpeLists lists, bool byte_level,
                   const std::vector<AddedToken>& added, const std::string& where) {
  const std::string type = type_of(model, "model", where);
  if (type != "BPE") {
    bad_tokenizer("unsupported tokenizer model '" + type + "'", where, "only BPE is implemented");
  }
  check_keys(model,
             {"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
              "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"},
             "BPE model", where);
  if (optional_number(model, "dropout", 0, where) != 0) {
    bad_tokenizer("BPE dropout", where, "random merges are not supported");
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (member(model, key) && !require_string(model, key, where).empty()) {
      bad_tokenizer(std::string("BPE ") + key, where, "is not supported");
    }
  }
  Bpe bpe;
  bpe.where_ = where;
  bpe.byte_level_ = byte_level;
  bpe.fuse_unk_ = optional_bool(model, "fuse_unk", false, where);
  bpe.byte_fallback_ = optional_bool(model, "byte_fallback", false, where);
  bpe.ignore_merges_ = optional_bool(model, "ignore_merges", false, where);
  if (!require(model, "vocab", where).is_object() || lists.vocab_.empty()) {
    bad_tokenizer("vocab", where, "must map tokens to ids");
  }
  if (!require(model, "merges", where).is_array()) bad_tokenizer("merges", where, "must be a list");
  bpe.read_vocab(std::move(lists.vocab_), added.size());
  bpe.read_merges(lists.merges_, lists.n_merges_);
  if (member(model, "unk_token")) {
    bpe.unk_token_ = require_string(model, "unk_token", where);
    bpe.unk_ = bpe.id_of(bpe.unk_token_);
    if (bpe.unk_ < 0) bad_tokenizer("unk_token '" + bpe.unk_token_ + "'", where, "is not in vocab");
  }
  bpe.make_byte_table();
  bpe.make_inner_pairs();
  if (bpe.n_merges_ == 0) bpe.require_merges(added);
  return bpe;
}

void Bpe::read_vocab(std::vector<BpeLists::Entry> entries, size_t n_added) {
  // Ids are dense over vocabulary and added tokens (checked by the caller), so none is larger.
  const size_t bound = entries.size() + n_added;
  size_t size = 0;
  for (const BpeLists::Entry& entry : entries) {
    if (static_cast<size_t>(entry.id) >= bound) {
      bad_tokenizer("id of vocab entry '" + entry.text + "'", where_,
                    "must be an integer from 0 to " + std::to_string(bound - 1));
    }
    size = std::max(size, static_cast<size_t>(entry.id) + 1);
  }
  strings_.resize(size);
  std::vector<bool> taken(size, false);
  for (BpeLists::Entry& entry : entries) {
    const auto index = static_cast<size_t>(entry.id);
    if (taken[index]) {
      bad_tokenizer("vocab id " + std::to_string(entry.id), where_,
                    "is used by '" + strings_[index] + "' and '" + entry.text + "'");
    }
    taken[index] = true;
    strings_[index] = std::move(entry.text);
  }
  entries = {};
  ids_.reserve(size);
  for (size_t id = 0; id < size; ++id) {
    if (taken[id]) ids_.emplace(strings_[id], static_cast<int32_t>(id));
  }
}

void Bpe::read_merges(const std::string& texts, int64_t count) {
  std::vector<std::pair<int32_t, Merge>> all;  // left, rest
  all.reserve(static_cast<size_t>(count));
  std::string joined;
  size_t at = 0;
  const auto next = [&] {
    const size_t begin = at, end = texts.find(kEndOfToken, at);
    at = end + 1;
    return std::string_view(texts).substr(begin, end - begin);
  };
  for (int64_t rank = 0; rank < count; ++rank) {
    const std::string_view left = next(), right = next();
    joined.assign(left).append(right);
    int32_t ids[3];
    const std::string_view names[3] = {left, right, joined};
    for (int i = 0; i < 3; ++i) {
      ids[i] = id_of(names[i]);
      if (ids[i] < 0) {
        bad_tokenizer("merge " + std::to_string(rank), where_,
                      "'" + std::string(names[i]) + "' is not in vocab");
      }
    }
    all.push_back({ids[0], {ids[1], static_cast<int32_t>(rank), ids[2]}});
  }
  n_merges_ = count;
  // A pair listed twice takes the later rank, as in the reference.
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) {
    return std::tuple(a.first, a.second.right, -a.second.rank) <
           std::tuple(b.first, b.second.right, -b.second.rank);
  });
  all.erase(std::unique(all.begin(), all.end(),
                        [](const auto& a, const auto& b) {
                          return a.first == b.first && a.second.right == b.second.right;
                        }),
            all.end());
  first_merge_.assign(strings_.size() + 1, 0);
  merges_.reserve(all.size());
  for (const auto& [left, merge] : all) {
    ++first_merge_[static_cast<size_t>(left) + 1];
    merges_.push_back(merge);
  }
  for (size_t i = 1; i < first_merge_.size(); ++i) first_merge_[i] += first_merge_[i - 1];
}

// Without merges a text would silently fall into single characters.
void Bpe::require_merges(const std::vector<AddedToken>& added) const {
  std::unordered_set<std::string_view> exempt{unk_token_};
  for (const AddedToken& token : added) exempt.insert(token.content);
  for (const std::string& text : strings_) {
    const bool is_byte = text.size() == 6 && text.compare(0, 3, "<0x") == 0;
    if (!is_byte && !exempt.count(text) && count_chars(text) > 1) {
      bad_tokenizer("empty merges", where_, "but vocab has the long token '" + text + "'");
    }
  }
}

void Bpe::make_byte_table() {
  byte_id_.assign(256, -1);
  for (unsigned byte = 0; byte < 256; ++byte) {
    std::string letter;
    append_utf8(letter, byte_to_letter(static_cast<unsigned char>(byte)));
    byte_id_[byte] = id_of(byte_level_ ? letter : byte_token(byte));
    if (byte_level_ && byte_fallback_ && byte_id_[byte] < 0) {
      // The reference would then fall back on the bytes of the letter, which no model wants.
      bad_tokenizer("byte_fallback with ByteLevel", where_,
                    "the letter of byte " + std::to_string(byte) + " is not in vocab");
    }
  }
}

// SentencePiece-style tokenizers give the whole text as one piece. Cutting it where no token can
// reach across gives the same ids and lets the cache work.
void Bpe::make_inner_pairs() {
  if (byte_level_ || n_merges_ == 0) return;
  const auto add_pairs = [&](const std::string& text) {
    char32_t previous = 0;
    for (size_t i = 0; i < text.size();) {
      const Utf8Unit unit = utf8_at(text, i);
      if (i > 0) inner_pairs_.push_back(uint64_t{previous} << 32 | unit.code);
      previous = unit.code;
      i += unit.length;
    }
  };
  // Unknown characters and fallback bytes are symbols that their strings do not spell. If a merge
  // uses one, nothing is known about where merges end.
  std::vector<bool> opaque(strings_.size(), false);
  if (unk_ >= 0) opaque[static_cast<size_t>(unk_)] = true;
  for (const int32_t id : byte_id_) {
    if (id >= 0) opaque[static_cast<size_t>(id)] = true;
  }
  for (size_t left = 0; left < strings_.size(); ++left) {
    for (int64_t i = first_merge_[left]; i < first_merge_[left + 1]; ++i) {
      const Merge& merge = merges_[static_cast<size_t>(i)];
      if (opaque[left] || opaque[static_cast<size_t>(merge.right)]) return;
      add_pairs(strings_[static_cast<size_t>(merge.merged)]);
    }
  }
  std::sort(inner_pairs_.begin(), inner_pairs_.end());
  inner_pairs_.erase(std::unique(inner_pairs_.begin(), inner_pairs_.end()), inner_pairs_.end());
  can_cut_ = !ignore_merges_;
}

// End of the first stretch of `text` that can be encoded alone. Between unknown characters there
// is no cut, because those fuse.
size_t Bpe::find_cut(std::string_view text) const {
  Utf8Unit previous = utf8_at(text, 0);
  for (size_t i = previous.length; i < text.size();) {
    const Utf8Unit unit = utf8_at(text, i);
    const uint64_t pair = uint64_t{previous.code} << 32 | unit.code;
    if (!std::binary_search(inner_pairs_.begin(), inner_pairs_.end(), pair) &&
        id_of(text.substr(i - previous.length, previous.length)) >= 0 &&
        id_of(text.substr(i, unit.length)) >= 0) {
      return i;
    }
    previous = unit;
    i += unit.length;
  }
  return text.size();
}

int32_t Bpe::id_of(std::string_view text) const {
  const auto found = ids_.find(text);
  return found == ids_.end() ? -1 : found->second;
}

// Id of a piece that is a string of the vocabulary, or -1.
int32_t Bpe::whole_piece(std::string_view piece) const {
  if (!byte_level_) return id_of(piece);
  std::string letters;
  for (const char c : piece) append_utf8(letters, byte_to_letter(static_cast<unsigned char>(c)));
  return id_of(letters);
}

bool Bpe::can_make(int32_t id) const {
  const std::string& text = strings_[static_cast<size_t>(id)];
  if (count_chars(text) == 1 || std::find(byte_id_.begin(), byte_id_.end(), id) != byte_id_.end()) {
    return true;
  }
  std::string bytes;
  if (ignore_merges_ && (!byte_level_ || (letters_to_bytes(text, bytes) && is_valid_utf8(bytes)))) {
    return true;
  }
  return std::any_of(merges_.begin(), merges_.end(),
                     [&](const Merge& merge) { return merge.merged == id; });
}

const Bpe::Merge* Bpe::find_merge(int32_t left, int32_t right) const {
  const auto begin = merges_.begin() + first_merge_[static_cast<size_t>(left)];
  const auto end = merges_.begin() + first_merge_[static_cast<size_t>(left) + 1];
  const auto found = std::lower_bound(
      begin, end, right, [](const Merge& merge, int32_t value) { return merge.right < value; });
  return found == end || found->right != right ? nullptr : &*found;
}

void Bpe::encode(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const {
  while (can_cut_ && !piece.empty()) {
    const size_t cut = find_cut(piece);
    encode_stretch(piece.substr(0, cut), scratch, ids);
    piece.remove_prefix(cut);
  }
  if (!piece.empty()) encode_stretch(piece, scratch, ids);
}

void Bpe::encode_stretch(std::string_view piece, Scratch& scratch,
                         std::vector<int32_t>& ids) const {
  const bool cacheable = piece.size() <= kMaxCachedBytes;
  if (cacheable) {
    if (const auto found = scratch.cache.find(piece); found != scratch.cache.end()) {
      const auto first = scratch.cached_ids.begin() + static_cast<ptrdiff_t>(found->second.begin);
      ids.insert(ids.end(), first, first + static_cast<ptrdiff_t>(found->second.count));
      return;
    }
  }
  const size_t begin = ids.size();
  encode_uncached(piece, scratch, ids);
  if (cacheable && scratch.cache.size() < kMaxCacheEntries) {
    scratch.cache.emplace(piece, Scratch::Cached{scratch.cached_ids.size(), ids.size() - begin});
    scratch.cached_ids.insert(scratch.cached_ids.end(), ids.begin() + static_cast<ptrdiff_t>(begin),
                              ids.end());
  }
}

void Bpe::encode_uncached(std::string_view piece, Scratch& scratch,
                          std::vector<int32_t>& ids) const {
  if (ignore_merges_) {
    if (const int32_t id = whole_piece(piece); id >= 0) {
      ids.push_back(id);
      return;
    }
  }
  if (piece.size() >= static_cast<size_t>(INT32_MAX)) {
    bad_tokenizer("text", where_, "a piece without a break has 2 GiB or more");
  }
  std::vector<int32_t> start;
  start.reserve(piece.size());
  byte_level_ ? byte_symbols(piece, start) : char_symbols(piece, start);
  merge_symbols(start, scratch, ids);
}

void Bpe::byte_symbols(std::string_view piece, std::vector<int32_t>& ids) const {
  bool after_unk = false;
  for (const char c : piece) {
    const int32_t id = byte_id_[static_cast<unsigned char>(c)];
    if (id >= 0) {
      ids.push_back(id);
      after_unk = false;
    } else if (unk_ >= 0) {
      if (!(fuse_unk_ && after_unk)) ids.push_back(unk_);
      after_unk = true;
    }
    // A byte without a token and without unk is dropped, as the reference does. SmolLM2's
    // vocabulary lacks 21 byte letters; three of them occur in valid UTF-8.
  }
}

void Bpe::char_symbols(std::string_view piece, std::vector<int32_t>& ids) const {
  // The reference holds an unknown character back until the next known one, and does not count a
  // byte fallback as known: the unk then stands behind the bytes.
  bool pending = false;
  for (size_t i = 0; i < piece.size();) {
    const size_t length = utf8_at(piece, i).length;
    const std::string_view text = piece.substr(i, length);
    i += length;
    const int32_t id = id_of(text);
    if (id >= 0) {
      if (pending) ids.push_back(unk_);
      pending = false;
      ids.push_back(id);
      continue;
    }
    const auto byte_known = [&](char c) { return byte_id_[static_cast<unsigned char>(c)] >= 0; };
    if (byte_fallback_ && std::all_of(text.begin(), text.end(), byte_known)) {
      for (const char c : text) ids.push_back(byte_id_[static_cast<unsigned char>(c)]);
      continue;
    }
    if (unk_ < 0) continue;
    if (pending && !fuse_unk_) ids.push_back(unk_);
    pending = true;
  }
  if (pending) ids.push_back(unk_);
}

void Bpe::merge_symbols(const std::vector<int32_t>& start, Scratch& scratch,
                        std::vector<int32_t>& ids) const {
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  symbols.clear();
  heap.clear();
  const auto n = static_cast<int32_t>(start.size());
  for (int32_t i = 0; i < n; ++i) {
    symbols.push_back({start[static_cast<size_t>(i)], i - 1, i + 1 < n ? i + 1 : -1});
  }
  const auto symbol = [&](int32_t i) -> Scratch::Symbol& {
    return symbols[static_cast<size_t>(i)];
  };
  // Smallest value first: lowest rank, then leftmost.
  const auto consider = [&](int32_t left) {
    const Merge* merge = find_merge(symbol(left).id, symbol(symbol(left).next).id);
    if (merge) {
      heap.push_back(uint64_t{static_cast<uint32_t>(merge->rank)} << 32 |
                     static_cast<uint32_t>(left));
    }
    return merge != nullptr;
  };
  for (int32_t i = 0; i + 1 < n; ++i) consider(i);
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  while (!heap.empty()) {
    const uint64_t best = heap.front();
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    heap.pop_back();
    const auto position = static_cast<int32_t>(best & 0xFFFFFFFFu);
    Scratch::Symbol& left = symbol(position);
    if (left.id < 0 || left.next < 0) continue;  // merged away meanwhile
    Scratch::Symbol& right = symbol(left.next);
    const Merge* merge = find_merge(left.id, right.id);
    // Both symbols of a pair only grow, so another rank means that another pair stands here now.
    if (!merge || static_cast<uint64_t>(merge->rank) != best >> 32) continue;
    left.id = merge->merged;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbol(left.next).previous = position;
    if (left.previous >= 0 && consider(left.previous)) {
      std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }
    if (left.next >= 0 && consider(position)) {
      std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }
  }
  for (int32_t i = 0; i < n; ++i) {
    if (symbol(i).id >= 0) ids.push_back(symbol(i).id);
  }
}

}  // namespace tq
