// The strict JSON reader: what it refuses and how it says so, exact integers, linear time.
#include <gtest/gtest.h>

#include <chrono>
#include <functional>

#include "model/json.h"
#include "tests/expect_error.h"
#include "tests/temp_dir.h"

namespace tq {
namespace {

Json parse(std::string_view text) {
  return parse_json(text, "x.json");
}

void expect_bad(std::string_view text, std::initializer_list<std::string> words) {
  SCOPED_TRACE(std::string(text.substr(0, 60)));
  expect_error(ErrorKind::kBadData, words, [&] { parse(text); });
}

double seconds_of(const std::function<void()>& action) {
  const auto start = std::chrono::steady_clock::now();
  action();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

TEST(ParseJson, ReadsEveryKindOfValue) {
  const Json json = parse(R"( {"a":[1,-2,2.5,true,false,null,"s"],"b":{"c":{}},"":[]}
)");
  EXPECT_EQ(json["a"], Json::array({1, -2, 2.5, true, false, nullptr, "s"}));
  EXPECT_TRUE(json["b"]["c"].is_object());
  EXPECT_TRUE(json[""].is_array());
  EXPECT_EQ(parse("7"), 7);
  EXPECT_EQ(parse("\"\\u00e9\\ud83d\\ude00\""), "\xC3\xA9\xF0\x9F\x98\x80");
}

TEST(ParseJson, KeepsTheOrderOfKeys) {
  EXPECT_EQ(parse(R"({"z":1,"a":{"y":2,"b":3},"m":4})").dump(),
            R"({"z":1,"a":{"y":2,"b":3},"m":4})");
}

TEST(ParseJson, KeepsIntegersExact) {
  EXPECT_EQ(parse("9007199254740993").get<int64_t>(), 9007199254740993);
  EXPECT_EQ(parse("-9223372036854775808").get<int64_t>(), INT64_MIN);
  EXPECT_EQ(parse("18446744073709551615").get<uint64_t>(), UINT64_MAX);
}

TEST(ParseJson, NamesLineAndColumnOfSyntaxErrors) {
  expect_bad("", {"(x.json)", "line 1, column 1", "unexpected end of input"});
  expect_bad("{\"a\": 1,\n  oops}", {"line 2, column 3", "invalid literal"});
  expect_bad("[1,\n2", {"line 2, column 2", "unexpected end of input"});
  expect_bad("[1 2]", {"line 1, column 4"});
  expect_bad("{\"a\":1,}", {"line 1, column 8"});
  expect_bad("{a:1}", {"line 1, column 2"});
  expect_bad("[01]", {"line 1, column 3"});
  expect_bad("[+1]", {"line 1, column 2"});
  expect_bad("[NaN]", {"line 1, column 2"});
  expect_bad("{} {}", {"line 1, column 4"});
  expect_bad("[1e999]", {"line 1, column 6", "overflow"});
  expect_bad("// comment\n1", {"line 1, column 1"});
}

TEST(ParseJson, RefusesInvalidText) {
  expect_bad("\"\xFF\"", {"UTF-8"});
  expect_bad("\"\xC0\xAF\"", {"UTF-8"});      // overlong
  expect_bad("\"\xED\xA0\x80\"", {"UTF-8"});  // surrogate
  expect_bad("\"a\xC3\"", {"UTF-8"});         // ends inside a character
  expect_bad("\"\\ud83d\"", {"surrogate"});
  expect_bad("\"\\ude00\"", {"surrogate"});
  expect_bad("\"\\ud83dx\"", {"surrogate"});
  expect_bad("\"\\x41\"", {"forbidden character"});
  expect_bad("\"a\nb\"", {"control character"});
  expect_bad("\xEF\xBB\xBF{}", {"byte order mark"});
}

TEST(ParseJson, RefusesNulBytesEverywhere) {
  expect_bad(std::string_view("{}\0\0", 4), {"line 1, column 3", "NUL"});
  expect_bad(std::string_view("{}\n\0[", 5), {"line 2, column 1", "NUL"});
  expect_bad(std::string_view("\"a\0b\"", 5), {"NUL"});
}

TEST(ParseJson, AcceptsWhitespaceAroundTheValue) {
  EXPECT_EQ(parse(" \t\r\n[1]\n\r\t "), Json::array({1}));
  expect_bad("[1]\v", {"line 1, column 4"});
}

TEST(ParseJson, RefusesDuplicateKeysInOneObject) {
  expect_bad("{\"a\":1,\n\"b\":2,\"a\":3}", {"line 2", "\"a\"", "twice"});
  expect_bad(R"([{"k":{"\u0061":1,"a":2}}])", {"\"a\"", "twice"});
  EXPECT_EQ(parse(R"([{"a":{"a":1}},{"a":2}])").size(), 2u);
}

TEST(ParseJson, LimitsNestingTo64Levels) {
  const auto nested = [](size_t depth) {
    return std::string(depth, '[') + std::string(depth, ']');
  };
  parse(nested(64));
  expect_bad(nested(65), {"line 1, column 65", "64 levels"});
  std::string objects;
  for (int i = 0; i < 65; ++i) objects += "{\"a\":";
  expect_bad(objects, {"64 levels"});
}

TEST(ParseJson, AMegabyteOfBracketsIsRefusedAtOnce) {
  for (const char* unit : {"[", "{\"a\":", "[{\"a\":"}) {
    std::string text;
    while (text.size() < (1u << 20)) text += unit;
    EXPECT_LT(seconds_of([&] { expect_bad(text, {"64 levels"}); }), 1.0);
  }
}

// Quadratic insertion or duplicate search takes minutes for this many keys; linear ones take tenths
// of a second, also with sanitizers. The bound is far from both.
TEST(ParseJson, TakesLinearTimeInTheNumberOfKeys) {
  std::string text = "{";
  for (int i = 0; i < 300000; ++i) {
    text += (i ? ",\"key" : "\"key") + std::to_string(i) + "\":" + std::to_string(i);
  }
  text += "}";
  Json json;
  EXPECT_LT(seconds_of([&] { json = parse(text); }), 10.0);
  EXPECT_EQ(json.size(), 300000u);
}

TEST(ParseJson, MessagesStayShortAndHarmless) {
  const std::string giant(1 << 20, 'k');
  const auto message = [&](const std::string& text) {
    try {
      parse(text);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string(10000, '?');
  };
  EXPECT_LT(message("{\"" + giant + "\":1,\"" + giant + "\":2}").size(), 400u);
  EXPECT_LT(message("{\"" + giant).size(), 400u);
  EXPECT_LT(message("{" + giant + "}").size(), 400u);
  EXPECT_EQ(message("{\"\\u001b\":1,\"\\u001b\":1}").find('\x1b'), std::string::npos);
}

TEST(ParseJson, EveryTruncationAndByteFlipIsAnErrorOrAValue) {
  const std::string text =
      "{\"a\":[1,-2.5e3,true,null],\"\xC3\xA9\":{\"b\":\"\\ud83d\\ude00\\n\"},\"c\":false}";
  parse(text);
  const auto try_parse = [](const std::string& damaged) {
    try {
      parse(damaged);
      return true;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kBadData);
      return false;
    }
  };
  for (size_t n = 0; n < text.size(); ++n) EXPECT_FALSE(try_parse(text.substr(0, n))) << n;
  int accepted = 0;
  for (size_t at = 0; at < text.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string damaged = text;
      damaged[at] = static_cast<char>(damaged[at] ^ (1 << bit));
      accepted += try_parse(damaged);
    }
  }
  EXPECT_GT(accepted, 0);  // a flipped letter of a key is still JSON
}

TEST(RequireInt, AcceptsExactIntegersInRangeOnly) {
  const Json json =
      parse(R"({"a":5,"neg":-1,"one":1.0,"exp":1e3,"text":"1","yes":true,"none":null,)"
            R"("huge":18446744073709551615,"beyond":18446744073709551616,"deep":[5]})");
  EXPECT_EQ(require_int(json, "a", 5, 5, "x"), 5);
  EXPECT_EQ(require_int(json, "neg", -1, 0, "x"), -1);
  for (const char* key : {"neg", "one", "exp", "text", "yes", "none", "huge", "beyond", "deep"}) {
    expect_error(ErrorKind::kBadData, {std::string("\"") + key + "\"", "from 0 to 9"},
                 [&] { require_int(json, key, 0, 9, "x"); });
  }
  expect_error(ErrorKind::kBadData, {"\"a\" is 5", "from 6 to 9"},
               [&] { require_int(json, "a", 6, 9, "x"); });
  expect_error(ErrorKind::kBadData, {"\"missing\""},
               [&] { require_int(json, "missing", 0, 9, "x"); });
  expect_error(ErrorKind::kBadData, {"(x)", "expected an object"},
               [&] { require_int(Json::array(), "a", 0, 9, "x"); });
}

TEST(OptionalFields, NullAndAbsentMeanTheFallback) {
  const Json json = parse(R"({"null":null,"i":3,"d":0.5,"b":true})");
  for (const char* key : {"null", "absent"}) {
    EXPECT_EQ(optional_int(json, key, 8, 0, 9, "x"), 8);
    EXPECT_EQ(optional_number(json, key, 1.5, "x"), 1.5);
    EXPECT_EQ(optional_bool(json, key, true, "x"), true);
  }
  EXPECT_EQ(optional_int(json, "i", 8, 0, 9, "x"), 3);
  EXPECT_EQ(optional_number(json, "d", 8, "x"), 0.5);
  EXPECT_EQ(optional_number(json, "i", 8, "x"), 3.0);
  EXPECT_EQ(optional_bool(json, "b", false, "x"), true);
}

TEST(OptionalFields, WrongTypesAreErrorsThatNameTheKey) {
  const Json json = parse(R"({"v":"text","n":1,"o":{}})");
  expect_error(ErrorKind::kBadData, {"\"v\" is \"text\"", "a number"},
               [&] { optional_number(json, "v", 0, "x"); });
  expect_error(ErrorKind::kBadData, {"\"n\" is 1", "true or false"},
               [&] { optional_bool(json, "n", false, "x"); });
  expect_error(ErrorKind::kBadData, {"\"o\" is an object", "a string"},
               [&] { require_string(json, "o", "x"); });
  expect_error(ErrorKind::kBadData, {"expected an object"},
               [&] { optional_bool(Json(3), "n", false, "x"); });
  EXPECT_EQ(require_string(json, "v", "x"), "text");
}

TEST(ReadTextFile, ReturnsTheBytesUpToTheLimit) {
  const TempDir dir;
  const std::string bytes = std::string("a\0b\n", 4) + std::string(100000, 'c');
  write_bytes(dir / "f", bytes);
  EXPECT_EQ(read_text_file(dir / "f", bytes.size()), bytes);
  expect_error(ErrorKind::kBadData, {dir / "f", "more than 100003 bytes"},
               [&] { read_text_file(dir / "f", bytes.size() - 1); });
  expect_error(ErrorKind::kIo, {dir / "none", "No such file"},
               [&] { read_text_file(dir / "none", 10); });
  expect_error(ErrorKind::kIo, {dir.path(), "directory"}, [&] { read_text_file(dir.path(), 10); });
}

}  // namespace
}  // namespace tq
