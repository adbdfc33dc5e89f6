// json - the strict JSON reader used for every untrusted text: config, tokenizer, headers.
//
// nlohmann-json does the parsing (through its SAX interface); this file adds what a hostile file
// needs: a depth limit, an error for duplicate keys, line and column in messages, exact integers.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "model/input_file.h"

namespace tq {

/// Keys keep their order of appearance, so that what we write is stable.
using Json = nlohmann::ordered_json;

/// Parses one JSON value. Throws Error(kBadData) with line and column for: syntax errors, invalid
/// UTF-8, lone surrogates, trailing bytes, duplicate keys in one object, nesting over 64.
/// Leading and trailing JSON whitespace is accepted. `where` names the file.
Json parse_json(std::string_view text, const std::string& where);

/// A container of a text whose members are handed over one by one, in order, instead of being kept:
/// a long list needs the memory of one member then. `key` is empty in an array.
struct JsonStream {
  // Keys of objects from the root on; empty: the root itself. A member of a stream may have a
  // stream of its own, and arrives without that one's members.
  std::vector<std::string> path;
  std::function<void(const std::string& key, Json&& value)> member;
};

/// parse_json() for texts with long lists; the containers of `streams` are empty in the result.
/// What remains, and each member, may hold a million values, or one for every 8 bytes of the text:
/// the memory is at most some 7 times the text beside what the streams keep.
Json parse_json(std::string_view text, const std::string& where,
                const std::vector<JsonStream>& streams);

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

/// Whole file as text. Throws kIo when it cannot be read, kBadData when larger than `max_bytes` or
/// a Git LFS pointer.
std::string read_text_file(const std::string& path, size_t max_bytes,
                           Accept accept = Accept::kRegularFiles);

}  // namespace tq
