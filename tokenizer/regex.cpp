// regex - compiling and running patterns with PCRE2. Syntax differences: regex_syntax.cpp.
#define PCRE2_CODE_UNIT_WIDTH 8
#include "tokenizer/regex.h"

#include <pcre2.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <new>

#include "model/error.h"
#include "tokenizer/utf8.h"

namespace tq {

// Steps of backtracking before a match is given up, beside the share for the text. A hostile
// pattern reaches it in a fraction of a second.
constexpr uint32_t kMatchLimit = 10'000'000;
// The interpreter keeps its backtracking points on the heap; in KiB.
constexpr uint32_t kHeapLimitKib = 256 * 1024;
// Time for one encode call: a fixed part and a part for each byte of the text (0.1 MB/s).
constexpr double kSeconds = 30, kSecondsPerByte = 1e-5;
// The clock is read after so many starting positions without a match, and so many matches.
constexpr size_t kStartsPerCall = 64, kMatchesPerCheck = 256;

struct RegexScratch::State {
  using Clock = std::chrono::steady_clock;
  Clock::time_point deadline;
  size_t n_matches = 0;
  pcre2_match_context* context = nullptr;
  pcre2_match_data* data = nullptr;
  ~State() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
  }
};

RegexScratch::RegexScratch(size_t text_bytes)
    : RegexScratch(text_bytes, kSeconds + kSecondsPerByte * static_cast<double>(text_bytes)) {}

RegexScratch::RegexScratch(size_t text_bytes, double max_seconds)
    : state_(std::make_unique<State>()) {
  state_->deadline = State::Clock::now() + std::chrono::duration_cast<State::Clock::duration>(
                                               std::chrono::duration<double>(max_seconds));
  state_->context = pcre2_match_context_create(nullptr);
  state_->data = pcre2_match_data_create(1, nullptr);  // only the whole match is asked for
  if (!state_->context || !state_->data) throw std::bad_alloc();
  const size_t share = std::min<size_t>(text_bytes, 1u << 30) * 2;
  pcre2_set_match_limit(state_->context, kMatchLimit + static_cast<uint32_t>(share));
  pcre2_set_heap_limit(state_->context, kHeapLimitKib);
}
RegexScratch::~RegexScratch() = default;

struct Regex::Code {
  pcre2_code* code = nullptr;
  ~Code() { pcre2_code_free(code); }
};

void Regex::compile(const std::string& pattern) {
  struct FreeContext {
    void operator()(pcre2_compile_context* context) const { pcre2_compile_context_free(context); }
  };
  const std::unique_ptr<pcre2_compile_context, FreeContext> context(
      pcre2_compile_context_create(nullptr));
  if (!context) throw std::bad_alloc();
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int code = 0;
  PCRE2_SIZE offset = 0;
  auto compiled = std::make_shared<Code>();
  // MULTILINE: in Ruby syntax ^ and $ always match at line ends.
  compiled->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                 PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_USE_OFFSET_LIMIT,
                                 &code, &offset, context.get());
  if (!compiled->code) {
    char reason[256] = "";
    if (code == PCRE2_ERROR_HEAP_FAILED) throw std::bad_alloc();
    pcre2_get_error_message(code, reinterpret_cast<PCRE2_UCHAR*>(reason), sizeof reason);
    throw Error(ErrorKind::kBadData, "unsupported regular expression", where_,
                std::string(reason) + " in '" + shown_ + "'");
  }
  // Without executable memory the interpreter does the same work more slowly.
  (void)pcre2_jit_compile(compiled->code, PCRE2_JIT_COMPLETE);
  code_ = std::move(compiled);
}

Regex::Regex(const std::string& pattern, const std::string& where)
    : shown_(pattern.substr(0, 300)), where_(where) {
  compile(oniguruma_to_pcre2(pattern, where));
}

Regex Regex::pcre2(const std::string& pattern) {
  Regex regex;
  regex.shown_ = pattern;
  regex.compile(pattern);
  return regex;
}

Regex Regex::literal(const std::string& text, const std::string& where) {
  Regex regex;
  regex.shown_ = text.substr(0, 300);
  regex.where_ = where;
  std::string pattern;
  for (char c : text) {
    // \Q..\E would end at an \E in the text.
    if (static_cast<unsigned char>(c) < 0x80 && !std::isalnum(static_cast<unsigned char>(c))) {
      static constexpr char kHex[] = "0123456789ABCDEF";
      pattern += std::string("\\x") + kHex[c >> 4] + kHex[c & 15];
    } else {
      pattern += c;
    }
  }
  regex.compile(pattern);
  return regex;
}

void Regex::give_up(const std::string& reason) const {
  throw Error(ErrorKind::kBadData, "regular expression gives up on this text", where_,
              reason + " in '" + shown_ + "'");
}

bool Regex::match(std::string_view text, size_t at, RegexScratch& scratch, Span& found) const {
  RegexScratch::State& state = *scratch.state_;
  pcre2_set_offset_limit(state.context, at + kStartsPerCall);
  // The caller has checked the text once; checking it again for every match is quadratic.
  const auto run = [&](uint32_t options) {
    return pcre2_match(code_->code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                       PCRE2_NO_UTF_CHECK | options, state.data, state.context);
  };
  int result = run(0);
  if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = run(PCRE2_NO_JIT);
  if (result == PCRE2_ERROR_NOMATCH || ++state.n_matches % kMatchesPerCheck == 0) {
    if (RegexScratch::State::Clock::now() > state.deadline) give_up("it takes too long");
  }
  if (result == PCRE2_ERROR_NOMATCH) return false;
  if (result < 0) {
    char reason[256] = "";
    if (result == PCRE2_ERROR_NOMEMORY) throw std::bad_alloc();
    pcre2_get_error_message(result, reinterpret_cast<PCRE2_UCHAR*>(reason), sizeof reason);
    give_up(reason);
  }
  const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(state.data);
  found = {bounds[0], bounds[1]};
  return true;
}

void Regex::find_all(std::string_view text, RegexScratch& scratch,
                     std::vector<Span>& matches) const {
  size_t at = 0, last_end = std::string_view::npos;
  while (at <= text.size()) {
    Span found;
    if (!match(text, at, scratch, found)) {
      at += kStartsPerCall + 1;
      while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) ++at;
    } else if (found.begin == found.end && found.end == last_end) {
      at += at < text.size() ? utf8_at(text, at).length : 1;
    } else {
      matches.push_back(found);
      at = last_end = found.end;
    }
  }
}

}  // namespace tq
