// config_fields - reading single fields of a config.json. Private to config.cpp and rope.cpp.
#pragma once

#include <string>

#include "model/config.h"
#include "model/error.h"
#include "model/json.h"

namespace tq {

/// Present and not null.
inline bool has_value(const Json& json, const char* key) {
  const auto it = json.find(key);
  return it != json.end() && !it->is_null();
}

inline std::string field_text(const std::string& key, const Json& value) {
  const std::string text = value.is_structured() ? "{...}" : value.dump();
  return key.substr(0, 80) + " = " + text.substr(0, 80);
}

inline Error unsupported(const std::string& key, const Json& value, const std::string& where,
                         const std::string& hint = "") {
  return Error(ErrorKind::kBadData, "config value not supported", where, field_text(key, value),
               hint);
}

inline Error bad_config(const std::string& why, const std::string& where,
                        const std::string& hint = "") {
  return Error(ErrorKind::kBadData, "bad config", where, why, hint);
}

/// A number in [low, high]; throws kBadData naming the field.
double require_number(const Json& json, const char* key, double low, double high,
                      const std::string& where);

/// The rotary parameters of either schema. `json` is the whole config.
RopeConfig parse_rope(const Json& json, int64_t max_seq_len, const std::string& where);

}  // namespace tq
