// component - reading the parts of tokenizer.json: {"type": ..., fields...}.
//
// Every part lists its known keys; any other key is an error, because a key that we do not know
// may change the ids.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>

#include "model/error.h"
#include "model/json.h"

namespace tq {

[[noreturn]] inline void bad_tokenizer(const std::string& what, const std::string& where,
                                       const std::string& why) {
  throw Error(ErrorKind::kBadData, what, where, why);
}

// No model has more (model/config.cpp), and each takes ten times the memory of its text.
constexpr size_t kMaxTokens = size_t{1} << 20;

[[noreturn]] inline void too_many_tokens(const std::string& where) {
  bad_tokenizer("tokens", where, "there are more than " + std::to_string(kMaxTokens));
}

/// Throws for a value that is not an object and for keys that are not in `known`.
inline void check_keys(const Json& object, std::initializer_list<std::string_view> known,
                       const std::string& what, const std::string& where) {
  if (!object.is_object()) bad_tokenizer(what, where, "must be an object");
  for (const auto& item : object.items()) {
    if (std::find(known.begin(), known.end(), item.key()) == known.end()) {
      bad_tokenizer("unknown key '" + item.key() + "' in " + what, where,
                    "it may change the token ids");
    }
  }
}

/// The member, or null if it is absent or JSON null.
inline const Json* member(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

inline std::string type_of(const Json& component, const std::string& what,
                           const std::string& where) {
  if (!component.is_object()) bad_tokenizer(what, where, "must be an object");
  return require_string(component, "type", where);
}

/// Calls add(step, type) for a component, or for each one inside it when it is a Sequence, which
/// keeps its components in `list_key` and may hold Sequences itself.
template <typename Add>
void for_each_step(const Json& component, const std::string& what, const char* list_key,
                   const std::string& where, const Add& add, int depth = 0) {
  constexpr int kMaxNesting = 8;
  const std::string type = type_of(component, what, where);
  if (depth > kMaxNesting) bad_tokenizer(what, where, "nested too deeply");
  if (type != "Sequence") {
    add(component, type);
    return;
  }
  check_keys(component, {"type", list_key}, what + " Sequence", where);
  const Json& steps = require(component, list_key, where);
  if (!steps.is_array()) bad_tokenizer(list_key, where, "must be a list");
  for (const Json& step : steps) for_each_step(step, what, list_key, where, add, depth + 1);
}

}  // namespace tq
