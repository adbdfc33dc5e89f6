// json - see json.h. nlohmann-json's lexer and iterative parser drive the handler below.
#include "model/json.h"

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <unordered_set>
#include <utility>
#include <vector>

#include "model/error.h"

namespace tq {
namespace {

constexpr size_t kMaxDepth = 64;

Error bad(const std::string& where, const std::string& why) {
  return Error(ErrorKind::kBadData, "bad JSON", where, why);
}

// Builds the value from parser events. Kept iterative: a file of brackets must not use the stack.
class Builder : public nlohmann::json_sax<Json> {
 public:
  Builder(std::string_view text, const std::string& where) : text_(text), where_(where) {}

  Json take() { return std::move(root_); }

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
    if (!open_.back().keys->insert(name).second) {
      throw bad(where_, "key \"" + name + "\" appears twice in one object");
    }
    key_ = std::move(name);
    return true;
  }

  bool parse_error(size_t position, const std::string& token,
                   const nlohmann::detail::exception& error) override {
    size_t line = 1, line_begin = 0;
    const size_t end = std::min(position > 0 ? position - 1 : 0, text_.size());
    for (size_t i = 0; i < end; ++i) {
      if (text_[i] != '\n') continue;
      ++line;
      line_begin = i + 1;
    }
    // nlohmann writes "[json.exception...] parse error at line..., column ...: syntax error ...";
    // its own position is dropped for ours, which is the same for every kind of error.
    std::string why = error.what();
    for (const char* cut : {"]", ": "}) {
      const size_t at = why.find(cut);
      if (at != std::string::npos) why.erase(0, at + std::strlen(cut));
    }
    (void)token;
    throw bad(where_, "line " + std::to_string(line) + ", column " +
                          std::to_string(end - line_begin + 1) + ": " + why);
  }

 private:
  struct Open {
    Json* value;
    std::unique_ptr<std::unordered_set<std::string>> keys;  // objects only
  };

  // Places a value in the innermost open container and returns where it landed.
  template <typename T>
  Json* place(T&& value) {
    if (open_.empty()) {
      root_ = Json(std::forward<T>(value));
      return &root_;
    }
    Json& parent = *open_.back().value;
    if (parent.is_array()) {
      parent.push_back(Json(std::forward<T>(value)));
      return &parent.back();
    }
    // ordered_json's own insertion searches all keys, quadratic for a vocabulary; ours are known
    // to be new.
    auto& members = parent.get_ref<Json::object_t&>();
    using Members = std::vector<std::pair<const std::string, Json>>;
    static_cast<Members&>(members).emplace_back(key_, Json(std::forward<T>(value)));
    return &members.back().second;
  }

  template <typename T>
  bool add(T&& value) {
    place(std::forward<T>(value));
    return true;
  }

  bool open(Json container) {
    if (open_.size() >= kMaxDepth) {
      throw bad(where_, "nested deeper than " + std::to_string(kMaxDepth) + " levels");
    }
    const bool is_object = container.is_object();
    // The pointer stays valid: a container only grows through its innermost open child.
    Json* value = place(std::move(container));
    open_.push_back(
        {value, is_object ? std::make_unique<std::unordered_set<std::string>>() : nullptr});
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }

  std::string_view text_;
  const std::string& where_;
  Json root_;
  std::vector<Open> open_;
  std::string key_;
};

std::string quoted(const char* key) {
  return "\"" + std::string(key) + "\"";
}

}  // namespace

Json parse_json(std::string_view text, const std::string& where) {
  Builder builder(text, where);
  if (!Json::sax_parse(text.begin(), text.end(), &builder)) throw bad(where, "not a JSON value");
  return builder.take();
}

const Json& require(const Json& object, const char* key, const std::string& where) {
  if (!object.is_object()) throw bad(where, "expected an object with " + quoted(key));
  const auto it = object.find(key);
  if (it == object.end()) throw bad(where, quoted(key) + " is missing");
  return *it;
}

int64_t require_int(const Json& object, const char* key, int64_t low, int64_t high,
                    const std::string& where) {
  const Json& value = require(object, key, where);
  const std::string range = std::to_string(low) + " to " + std::to_string(high);
  // Unsigned beyond int64 and every float, also 1.0, are refused.
  const bool exact =
      value.is_number_integer() &&
      !(value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX));
  if (!exact || value.get<int64_t>() < low || value.get<int64_t>() > high) {
    throw bad(where, quoted(key) + " is " + value.dump().substr(0, 64) +
                         ", expected a whole number from " + range);
  }
  return value.get<int64_t>();
}

int64_t optional_int(const Json& object, const char* key, int64_t fallback, int64_t low,
                     int64_t high, const std::string& where) {
  return object.contains(key) && !object[key].is_null() ? require_int(object, key, low, high, where)
                                                        : fallback;
}

double optional_number(const Json& object, const char* key, double fallback,
                       const std::string& where) {
  if (!object.contains(key) || object[key].is_null()) return fallback;
  const Json& value = object[key];
  if (!value.is_number() || !std::isfinite(value.get<double>())) {
    throw bad(where, quoted(key) + " is " + value.dump().substr(0, 64) + ", expected a number");
  }
  return value.get<double>();
}

bool optional_bool(const Json& object, const char* key, bool fallback, const std::string& where) {
  if (!object.contains(key) || object[key].is_null()) return fallback;
  if (!object[key].is_boolean()) {
    throw bad(where,
              quoted(key) + " is " + object[key].dump().substr(0, 64) + ", expected true or false");
  }
  return object[key].get<bool>();
}

std::string require_string(const Json& object, const char* key, const std::string& where) {
  const Json& value = require(object, key, where);
  if (!value.is_string()) {
    throw bad(where, quoted(key) + " is " + value.dump().substr(0, 64) + ", expected a string");
  }
  return value.get<std::string>();
}

std::string read_text_file(const std::string& path, size_t max_bytes) {
  const auto io_error = [&] {
    return Error(ErrorKind::kIo, "cannot read file", path, std::strerror(errno));
  };
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) throw io_error();
  std::string text;
  char block[1 << 16];
  size_t n;
  while ((n = std::fread(block, 1, sizeof block, file.get())) > 0) {
    if (text.size() + n > max_bytes) {
      throw Error(ErrorKind::kBadData, "file too large", path,
                  "more than " + std::to_string(max_bytes) + " bytes");
    }
    text.append(block, n);
  }
  if (std::ferror(file.get())) throw io_error();
  return text;
}

}  // namespace tq
