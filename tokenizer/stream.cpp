// stream - StreamDecoder: text of a token stream, never cutting a character in two.
#include "tokenizer/tokenizer.h"
#include "tokenizer/utf8.h"

namespace tq {

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special)
    : tokenizer_(tokenizer), skip_special_(skip_special) {}

std::string StreamDecoder::next(int32_t id) {
  tokenizer_.append_decoded(id, skip_special_, state_, pending_);
  // Only the last three bytes can belong to a character that is still incomplete.
  size_t complete = pending_.size();
  for (size_t back = 1; back <= 3 && back <= pending_.size(); ++back) {
    const size_t at = pending_.size() - back;
    if ((static_cast<unsigned char>(pending_[at]) & 0xC0) == 0x80) continue;
    if (utf8_at(pending_, at).kind == Utf8Unit::Kind::kIncomplete) complete = at;
    break;
  }
  std::string text = replace_invalid_utf8(std::string_view(pending_).substr(0, complete));
  pending_.erase(0, complete);
  return text;
}

std::string StreamDecoder::finish() {
  std::string text = replace_invalid_utf8(pending_);
  pending_.clear();
  return text;
}

}  // namespace tq
