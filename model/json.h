// json - the strict JSON reader used for every untrusted text: config, tokenizer, headers.
//
// nlohmann-json does the parsing (through its SAX interface); this file adds what a hostile file
// needs: a depth limit, an error for duplicate keys, line and column in messages, exact integers.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace tq {

/// Keys keep their order of appearance, so that what we write is stable.
using Json = nlohmann::ordered_json;

/// Parses one JSON value. Throws Error(kBadData) with line and column for: syntax errors, invalid
/// UTF-8, lone surrogates, trailing bytes, duplicate keys in one object, nesting over 64.
/// Leading and trailing JSON whitespace is accepted. `where` names the file.
Json parse_json(std::string_view text, const std::string& where);

/// Member access with messages that name the key. All throw Error(kBadData). The optional_ forms
/// take a null for an absent key, as Hugging Face does.
const Json& require(const Json& object, const char* key, const std::string& where);
/// An exact integer in [low, high]; 1.0, 1e3, "1" and true are refused.
int64_t require_int(const Json& object, const char* key, int64_t low, int64_t high,
                    const std::string& where);
int64_t optional_int(const Json& object, const char* key, int64_t fallback, int64_t low,
                     int64_t high, const std::string& where);
double optional_number(const Json& object, const char* key, double fallback,
                       const std::string& where);
bool optional_bool(const Json& object, const char* key, bool fallback, const std::string& where);
std::string require_string(const Json& object, const char* key, const std::string& where);

/// Whole file as text. Throws kIo when it cannot be read, kBadData when larger than `max_bytes`.
std::string read_text_file(const std::string& path, size_t max_bytes);

}  // namespace tq
