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

/// A Sequence holds lists of components; nesting deeper than this is refused.
constexpr int kMaxNesting = 8;

}  // namespace tq
