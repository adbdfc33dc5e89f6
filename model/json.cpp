// json - see json.h. nlohmann-json's lexer and iterative parser drive the builder below.
//
// nlohmann's own tree builder is not used: it keeps the last of two equal keys, has no depth limit,
// and inserts into an ordered object in quadratic time.
#include "model/json.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <unordered_set>
#include <utility>
#include <vector>

#include "model/error.h"

namespace tq {
namespace {

constexpr size_t kMaxDepth = 64;
// Where the long lists are handed over, what remains is a million values, or has this many bytes of
// text a value: a value of two bytes takes up to 48 of memory.
constexpr size_t kMostShortValues = 1'000'000, kBytesOfValue = 8;
constexpr size_t kSearched = 16;    // keys of an object that are compared one by one
constexpr size_t kMaxQuoted = 200;  // bytes of an untrusted value that a message repeats

Error bad(const std::string& where, const std::string& why) {
  return Error(ErrorKind::kBadData, "bad JSON", where, why);
}

std::string shorten(std::string text) {
  if (text.size() > kMaxQuoted) text = text.substr(0, kMaxQuoted) + "...";
  return text;
}

std::string in_quotes(std::string_view key) {
  return "\"" + shorten(std::string(key)) + "\"";
}

// "line L, column C" of a byte; both count from 1, columns in bytes.
std::string position_text(std::string_view text, size_t at) {
  const std::string_view before = text.substr(0, std::min(at, text.size()));
  const size_t line_begin = before.rfind('\n') + 1;  // npos + 1 = 0
  return "line " + std::to_string(std::count(before.begin(), before.end(), '\n') + 1) +
         ", column " + std::to_string(before.size() - line_begin + 1);
}

// Input iterator that tells how far the lexer has read; events do not carry a position.
class Cursor {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  Cursor(const char* at, const char** reached) : at_(at), reached_(reached) {}
  reference operator*() const { return *at_; }
  Cursor& operator++() {
    *reached_ = ++at_;
    return *this;
  }
  bool operator==(const Cursor& other) const { return at_ == other.at_; }
  bool operator!=(const Cursor& other) const { return at_ != other.at_; }

 private:
  const char* at_;
  const char** reached_;
};

// Builds the value from parser events. Kept iterative: a file of brackets must not use the stack.
class Builder : public nlohmann::json_sax<Json> {
 public:
  Builder(std::string_view text, const std::string& where, const std::vector<JsonStream>& streams)
      : text_(text), where_(where), reached_(text.data()), streams_(streams) {
    open_.reserve(kMaxDepth);  // so that addresses in it stay
    if (!streams.empty()) max_values_ = text.size() / kBytesOfValue + kMostShortValues;
  }

  Json build() {
    const Cursor begin(text_.data(), &reached_);
    const Cursor end(text_.data() + text_.size(), &reached_);
    if (!Json::sax_parse(begin, end, this)) throw bad(where_, "not a JSON value");
    return std::move(root_);
  }

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(number_integer_t value) override { return add(value); }
  bool number_unsigned(number_unsigned_t value) override { return add(value); }
  bool number_float(number_float_t value, const string_t&) override { return add(value); }
  bool string(string_t& value) override { return add(std::move(value)); }
  bool binary(binary_t&) override { return false; }  // not a JSON event

  bool start_object(size_t) override { return open(Json::object()); }
  bool start_array(size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& name) override {
    if (is_repeated(name)) {
      fail(last_byte(), "key " + in_quotes(name) + " appears twice in one object");
    }
    key_ = std::move(name);
    return true;
  }

  bool parse_error(size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    // nlohmann writes "[json.exception.KIND] parse error at line L, column C: WHY". Only WHY is
    // kept: the position is given in the same form for every kind of error.
    std::string why = error.what();
    why.erase(0, why.find("] ") + 2);
    if (why.rfind("parse error", 0) == 0) why.erase(0, why.find(": ") + 2);
    fail(position > 0 ? position - 1 : 0, shorten(why));
  }

 private:
  struct Open {
    Json* value = nullptr;               // in its parent, or `own`
    Json own = {};                       // of a member that is handed over
    size_t n_before = 0;                 // values in memory without it
    std::string key = {};                // in its parent
    const JsonStream* stream = nullptr;  // takes its members
    // Hashes of the keys of a large object: two of a million keys share one by a chance of 1 in ten
    // million, and the keys themselves would take more memory than the text.
    std::unique_ptr<std::unordered_set<size_t>> keys = nullptr;
  };

  // Small objects, which are most, are searched.
  bool is_repeated(const std::string& name) {
    Open& object = open_.back();
    const auto& members = object.value->get_ref<Json::object_t&>();
    if (!object.keys && (object.stream || members.size() == kSearched)) {
      object.keys = std::make_unique<std::unordered_set<size_t>>();
      for (const auto& member : members) object.keys->insert(hash_(member.first));
    }
    if (object.keys) return !object.keys->insert(hash_(name)).second;
    return std::any_of(members.begin(), members.end(),
                       [&](const auto& member) { return member.first == name; });
  }

  size_t last_byte() const { return static_cast<size_t>(reached_ - text_.data()) - 1; }

  [[noreturn]] void fail(size_t at, const std::string& why) const {
    throw bad(where_, position_text(text_, at) + ": " + why);
  }

  // Places a value in the innermost open container and returns where it landed.
  template <typename T>
  Json* place(T&& value) {
    if (++n_values_ > max_values_) {
      fail(last_byte(), "too many values for a text of " + std::to_string(text_.size()) + " bytes");
    }
    if (open_.empty()) {
      root_ = Json(std::forward<T>(value));
      return &root_;
    }
    Json& parent = *open_.back().value;
    if (parent.is_array()) {
      parent.push_back(Json(std::forward<T>(value)));
      return &parent.back();
    }
    // Straight into the vector behind ordered_json: its own insertion searches all keys, and
    // key() has already seen that this one is new.
    auto& members = parent.get_ref<Json::object_t&>();
    members.Json::object_t::Container::emplace_back(key_, Json(std::forward<T>(value)));
    return &members.back().second;
  }

  template <typename T>
  bool add(T&& value) {
    if (!open_.empty() && open_.back().stream) {
      open_.back().stream->member(open_.back().value->is_array() ? "" : key_,
                                  Json(std::forward<T>(value)));
    } else {
      place(std::forward<T>(value));
    }
    return true;
  }

  bool open(Json container) {
    if (open_.size() >= kMaxDepth) {
      fail(last_byte(), "nested deeper than " + std::to_string(kMaxDepth) + " levels");
    }
    const bool in_object = !open_.empty() && open_.back().value->is_object();
    const bool handed_over = !open_.empty() && open_.back().stream;
    const size_t n_before = n_values_;
    // The pointer stays valid: a container only grows while it is the innermost open one.
    Json* placed = handed_over ? nullptr : place(std::move(container));
    Open& next = open_.emplace_back();
    next.n_before = n_before;
    if (in_object) next.key = key_;
    if (handed_over) next.own = std::move(container);
    next.value = handed_over ? &next.own : placed;
    for (const JsonStream& stream : streams_) {
      if (is_at(stream.path)) next.stream = &stream;
    }
    return true;
  }

  // Whether the innermost open container is the one that a path leads to.
  bool is_at(const std::vector<std::string>& path) const {
    if (open_.size() != path.size() + 1) return false;
    for (size_t i = 0; i < path.size(); ++i) {
      if (!open_[i].value->is_object() || open_[i + 1].key != path[i]) return false;
    }
    return true;
  }

  bool close() {
    Open closed = std::move(open_.back());
    open_.pop_back();
    if (!open_.empty() && open_.back().stream) {
      open_.back().stream->member(closed.key, std::move(closed.own));
      n_values_ = closed.n_before;
    }
    return true;
  }

  std::string_view text_;
  const std::string& where_;
  const char* reached_;  // end of what the lexer has read
  Json root_;
  std::vector<Open> open_;
  std::string key_;
  const std::vector<JsonStream>& streams_;
  size_t n_values_ = 0;  // in memory
  size_t max_values_ = SIZE_MAX;
  const std::hash<std::string> hash_ = {};
};

// Member of an object, or null if it is absent or null.
const Json* find_member(const Json& object, const char* key, const std::string& where) {
  if (!object.is_object()) throw bad(where, "expected an object with " + in_quotes(key));
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

// Short text of a value for a message; containers are named, not printed.
std::string value_text(const Json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return "an array";
  if (value.is_string()) return in_quotes(value.get_ref<const std::string&>());
  return value.dump();
}

Error wrong_value(const char* key, const Json& value, const std::string& expected,
                  const std::string& where) {
  return Error(ErrorKind::kBadData, "bad value", where,
               in_quotes(key) + " is " + value_text(value) + ", expected " + expected);
}

}  // namespace

Json parse_json(std::string_view text, const std::string& where) {
  return parse_json(text, where, {});
}

Json parse_json(std::string_view text, const std::string& where,
                const std::vector<JsonStream>& streams) {
  // Two things that nlohmann lets pass: a byte order mark, and NUL as an end of the text.
  if (text.substr(0, 3) == "\xEF\xBB\xBF") {
    throw bad(where, "line 1, column 1: byte order mark, expected plain UTF-8");
  }
  const size_t nul = text.find('\0');
  if (nul != std::string_view::npos) throw bad(where, position_text(text, nul) + ": NUL byte");
  return Builder(text, where, streams).build();
}

const Json& require(const Json& object, const char* key, const std::string& where) {
  if (!object.is_object()) throw bad(where, "expected an object with " + in_quotes(key));
  const auto it = object.find(key);
  if (it == object.end()) {
    throw Error(ErrorKind::kBadData, "missing field", where, in_quotes(key) + " is not there");
  }
  return *it;
}

int64_t require_int(const Json& object, const char* key, int64_t low, int64_t high,
                    const std::string& where) {
  const Json& value = require(object, key, where);
  // The parser makes a float of 1.0, of 1e3, and of integers that do not fit 64 bits.
  const bool fits =
      value.is_number_integer() &&
      !(value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX));
  if (!fits || value.get<int64_t>() < low || value.get<int64_t>() > high) {
    throw wrong_value(key, value,
                      "a whole number from " + std::to_string(low) + " to " + std::to_string(high),
                      where);
  }
  return value.get<int64_t>();
}

int64_t optional_int(const Json& object, const char* key, int64_t fallback, int64_t low,
                     int64_t high, const std::string& where) {
  return find_member(object, key, where) ? require_int(object, key, low, high, where) : fallback;
}

double optional_number(const Json& object, const char* key, double fallback,
                       const std::string& where) {
  const Json* value = find_member(object, key, where);
  if (!value) return fallback;
  if (!value->is_number()) throw wrong_value(key, *value, "a number", where);
  return value->get<double>();  // finite: the parser refuses what overflows
}

bool optional_bool(const Json& object, const char* key, bool fallback, const std::string& where) {
  const Json* value = find_member(object, key, where);
  if (!value) return fallback;
  if (!value->is_boolean()) throw wrong_value(key, *value, "true or false", where);
  return value->get<bool>();
}

std::string require_string(const Json& object, const char* key, const std::string& where) {
  const Json& value = require(object, key, where);
  if (!value.is_string()) throw wrong_value(key, value, "a string", where);
  return value.get<std::string>();
}

std::string read_text_file(const std::string& path, size_t max_bytes, Accept accept) {
  InputFile file(path, accept);
  std::string text;
  std::vector<char> block(1 << 16);
  // The size of a regular file is known, and one byte more tells whether it still is true.
  text.reserve(std::min(file.size(), max_bytes) + 1);
  while (const size_t n = file.read(block.data(), block.size())) {
    if (n > max_bytes - text.size()) {
      throw Error(ErrorKind::kBadData, "file too large", path,
                  "more than " + std::to_string(max_bytes) + " bytes");
    }
    text.append(block.data(), n);
  }
  refuse_lfs_pointer(text, path);
  return text;
}

}  // namespace tq
