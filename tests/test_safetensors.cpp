// safetensors: every rule of the format, hostile headers, sharded folders.
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "model/safetensors.h"
#include "tests/expect_error.h"
#include "tests/safetensors_writer.h"
#include "tests/temp_dir.h"

namespace tq {
namespace {

class Safetensors : public ::testing::Test {
 protected:
  SafetensorsFile open(const std::string& bytes) {
    write_bytes(path_, bytes);
    return SafetensorsFile(path_);
  }
  void expect_bad(const std::string& bytes, std::initializer_list<std::string> words) {
    SCOPED_TRACE(bytes.substr(0, 200));
    expect_error(ErrorKind::kBadData, words, [&] { open(bytes); });
  }
  /// A file whose only tensor has this description, with `n` bytes of data.
  void expect_bad_tensor(const std::string& description, size_t n,
                         std::initializer_list<std::string> words) {
    expect_bad(safetensors_bytes("{\"w\":" + description + "}", std::string(n, 'd')), words);
  }

  TempDir dir_;
  std::string path_ = dir_ / "model.safetensors";
};

std::string tensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return "{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}

SafetensorsWriter small_writer() {
  SafetensorsWriter writer;
  writer.add("half", DType::kF16, {3}, {1.0f, -2.0f, 0.5f});
  writer.add("single", DType::kF32, {2, 1}, {3.25f, -4.0f});
  writer.add("brain", DType::kBF16, {1, 2}, {8.0f, 0.0f});
  return writer;
}

TEST_F(Safetensors, ReadsShapesTypesAndValues) {
  const SafetensorsFile file = open(small_writer().bytes());
  ASSERT_EQ(file.tensors().size(), 3u);
  EXPECT_EQ(to_f32(file.tensors().at("half")), (std::vector<float>{1.0f, -2.0f, 0.5f}));
  EXPECT_EQ(to_f32(file.tensors().at("single")), (std::vector<float>{3.25f, -4.0f}));
  EXPECT_EQ(to_f32(file.tensors().at("brain")), (std::vector<float>{8.0f, 0.0f}));
  EXPECT_EQ(file.tensors().at("single").shape, (std::vector<int64_t>{2, 1}));
  EXPECT_EQ(file.tensors().at("brain").dtype, DType::kBF16);
  EXPECT_EQ(file.data_bytes(), 18u);
}

TEST_F(Safetensors, AcceptsWhitespaceAroundTheHeader) {
  EXPECT_EQ(open(small_writer().bytes(" \t\r\n", "")).tensors().size(), 3u);
  EXPECT_EQ(open(small_writer().bytes("", std::string(4000, ' ') + "\n")).tensors().size(), 3u);
}

TEST_F(Safetensors, AcceptsTensorsInAnyOrderOfOffsets) {
  const std::string header =
      "{\"a\":" + tensor("F32", "[1]", "[4,8]") + ",\"b\":" + tensor("F32", "[1]", "[0,4]") + "}";
  const float values[2] = {1.0f, 2.0f};
  const SafetensorsFile file =
      open(safetensors_bytes(header, std::string(reinterpret_cast<const char*>(values), 8)));
  EXPECT_EQ(to_f32(file.tensors().at("a")), std::vector<float>{2.0f});
  EXPECT_EQ(to_f32(file.tensors().at("b")), std::vector<float>{1.0f});
}

TEST_F(Safetensors, AcceptsNoTensorsEmptyTensorsAndScalars) {
  EXPECT_TRUE(open(safetensors_bytes("{}", "")).tensors().empty());
  const std::string header = "{\"e\":" + tensor("F32", "[3,0,2]", "[4,4]") +
                             ",\"s\":" + tensor("F32", "[]", "[0,4]") +
                             ",\"f\":" + tensor("F32", "[0]", "[0,0]") + "}";
  const SafetensorsFile file = open(safetensors_bytes(header, std::string(4, '\0')));
  EXPECT_EQ(file.tensors().at("e").n_elements(), 0);
  EXPECT_EQ(file.tensors().at("f").n_elements(), 0);
  EXPECT_EQ(file.tensors().at("s").n_elements(), 1);
}

TEST_F(Safetensors, ListsTypesItCannotUse) {
  const std::string header = "{\"a\":" + tensor("I64", "[1]", "[0,8]") +
                             ",\"b\":" + tensor("F8_E4M3", "[2]", "[8,10]") +
                             ",\"c\":" + tensor("F4", "[4]", "[10,12]") + "}";
  const SafetensorsFile file = open(safetensors_bytes(header, std::string(12, 'd')));
  EXPECT_TRUE(file.tensors().empty());
  EXPECT_EQ(file.other_dtypes().at("a"), "I64");
  EXPECT_EQ(file.other_dtypes().at("b"), "F8_E4M3");
  EXPECT_EQ(file.other_dtypes().at("c"), "F4");
}

TEST_F(Safetensors, RefusesFilesTooSmallForAHeader) {
  expect_bad("", {path_, "0 bytes"});
  expect_bad("1234567", {"7 bytes"});
  expect_bad(std::string(8, '\0'), {"the header is empty"});
  expect_bad(std::string(8, '\0') + "data", {"the header is empty"});
}

TEST_F(Safetensors, RefusesHeaderLengthsBeforeReadingTheHeader) {
  const std::string good = small_writer().bytes();
  for (const uint64_t n :
       {UINT64_MAX, UINT64_MAX - 7, uint64_t{1} << 63, uint64_t{100'000'001}, uint64_t{100'000'000},
        uint64_t{good.size()}, uint64_t{good.size() - 7}}) {
    std::string bytes = good;
    std::memcpy(bytes.data(), &n, 8);
    expect_bad(bytes, {"a header of " + std::to_string(n) + " bytes"});
  }
}

TEST_F(Safetensors, RefusesHeadersThatAreNotAJsonObject) {
  expect_bad(safetensors_bytes("[]", ""), {"not a JSON object"});
  expect_bad(safetensors_bytes("{", ""), {"header", "line 1, column 2"});
  expect_bad(safetensors_bytes("{\"\xFF\":1}", ""), {"UTF-8"});
  expect_bad(safetensors_bytes(std::string("{}\0\0", 4), ""), {"NUL"});
  expect_bad(safetensors_bytes("{} {}", ""), {"column 4"});
  expect_bad(safetensors_bytes(std::string(1 << 20, '['), ""), {"64 levels"});
}

TEST_F(Safetensors, RefusesDuplicateKeys) {
  const std::string t = tensor("F32", "[1]", "[0,4]");
  expect_bad(safetensors_bytes("{\"w\":" + t + ",\"w\":" + t + "}", "1234"), {"\"w\"", "twice"});
  expect_bad_tensor(R"({"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]})", 4,
                    {"\"dtype\"", "twice"});
}

TEST_F(Safetensors, MetadataMapsStringsToStrings) {
  EXPECT_NO_THROW(open(safetensors_bytes(R"({"__metadata__":{"format":"pt"}})", "")));
  expect_bad(safetensors_bytes(R"({"__metadata__":{"n":1}})", ""), {"__metadata__.n"});
  expect_bad(safetensors_bytes(R"({"__metadata__":["pt"]})", ""), {"__metadata__"});
}

TEST_F(Safetensors, RefusesIncompleteOrUnknownDescriptions) {
  expect_bad_tensor("1", 0, {"tensor w", "object"});
  expect_bad_tensor(R"({"shape":[1],"data_offsets":[0,4]})", 4, {"dtype is missing"});
  expect_bad_tensor(R"({"dtype":"F32","data_offsets":[0,4]})", 4, {"shape is missing"});
  expect_bad_tensor(R"({"dtype":"F32","shape":[1]})", 4, {"data_offsets is missing"});
  expect_bad_tensor(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"strides":[1]})", 4,
                    {"unknown field strides"});
  expect_bad_tensor(R"({"dtype":1,"shape":[1],"data_offsets":[0,4]})", 4, {"dtype"});
  expect_bad_tensor(tensor("F33", "[1]", "[0,4]"), 4, {"tensor w", "unknown dtype F33"});
}

TEST_F(Safetensors, DimensionsAndOffsetsAreExactNonNegativeIntegers) {
  for (const char* value :
       {"-1", "1.0", "1e3", "\"1\"", "true", "null", "[1]", "18446744073709551616"}) {
    expect_bad_tensor(tensor("F32", std::string("[") + value + "]", "[0,4]"), 4,
                      {"tensor w: a dimension", "whole number"});
    expect_bad_tensor(tensor("F32", "[1]", std::string("[") + value + ",4]"), 4,
                      {"tensor w: an offset", "whole number"});
    expect_bad_tensor(tensor("F32", "[1]", std::string("[0,") + value + "]"), 4,
                      {"tensor w: an offset", "whole number"});
  }
  expect_bad_tensor(tensor("F32", "{}", "[0,4]"), 4, {"shape is not an array"});
  for (const char* offsets : {"[0]", "[0,4,4]", "{}", "4", "[]"}) {
    expect_bad_tensor(tensor("F32", "[1]", offsets), 4, {"not a pair"});
  }
}

TEST_F(Safetensors, ShapeProductsThatWrapAreOverflowsNotEmptyTensors) {
  for (const char* shape :
       {"[4294967296,4294967296]", "[9223372036854775808]", "[18446744073709551615]",
        "[4611686018427387904,4]", "[4611686018427387904,4,0]", "[3,6148914691236517206]",
        "[2305843009213693952]"}) {
    expect_bad_tensor(tensor("F64", shape, "[0,0]"), 0, {"tensor w", "overflow"});
  }
}

TEST_F(Safetensors, RefusesOffsetsThatDoNotTileTheData) {
  expect_bad_tensor(tensor("F32", "[1]", "[4,0]"), 4, {"4 > 0"});
  expect_bad_tensor(tensor("F32", "[1]", "[4,8]"), 8, {"begins at 4, expected 0", "hole"});
  expect_bad_tensor(tensor("F32", "[2]", "[0,4]"), 4, {"span 4 bytes", "need 8"});
  expect_bad_tensor(tensor("F32", "[1]", "[0,8]"), 8, {"span 8 bytes", "need 4"});
  expect_bad_tensor(tensor("F4", "[3]", "[0,2]"), 2, {"whole number of bytes"});
  expect_bad_tensor(tensor("F32", "[1]", "[18446744073709551612,18446744073709551615]"), 4,
                    {"span 3 bytes"});
  const auto two = [](const std::string& a, const std::string& b) {
    return "{\"a\":" + tensor("F32", "[1]", a) + ",\"b\":" + tensor("F32", "[1]", b) + "}";
  };
  expect_bad(safetensors_bytes(two("[0,4]", "[2,6]"), "123456"), {"tensor b", "overlap"});
  expect_bad(safetensors_bytes(two("[0,4]", "[0,4]"), "1234"), {"overlap"});
  expect_bad(safetensors_bytes(two("[0,4]", "[8,12]"), std::string(12, 'd')),
             {"tensor b", "begins at 8, expected 4", "hole"});
}

TEST_F(Safetensors, RefusesFilesThatEndEarlyOrLate) {
  const std::string good = small_writer().bytes();
  expect_bad(good.substr(0, good.size() - 1), {"17 bytes", "describes 18", "incomplete download"});
  expect_bad(good + "x", {"19 bytes", "describes 18"});
  expect_bad(good.substr(0, good.size() / 2), {"incomplete download"});
}

TEST_F(Safetensors, MissingFilesAndFoldersAreIoErrors) {
  expect_error(ErrorKind::kIo, {dir_ / "none"}, [&] { SafetensorsFile(dir_ / "none"); });
  expect_error(ErrorKind::kIo, {dir_.path()}, [&] { SafetensorsFile file(dir_.path()); });
}

// Damage of every kind in the header either is noticed or leaves a file that can be read: the
// sanitizers watch the reads.
TEST_F(Safetensors, EveryTruncationAndByteFlipOfTheHeaderIsAnErrorOrAValidFile) {
  const std::string good = small_writer().bytes();
  const size_t header_end = good.size() - 18;
  write_bytes(path_, good);
  const auto loads = [&] {
    try {
      const SafetensorsFile file(path_);
      for (const auto& item : file.tensors()) to_f32(item.second);
      return true;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kBadData) << error.what();
      return false;
    }
  };
  EXPECT_TRUE(loads());
  int accepted = 0;
  {
    // In place: rewriting whole files makes the file system wait for the disk.
    std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
    const auto put = [&](size_t at, char byte) {
      file.seekp(static_cast<std::streamoff>(at)).put(byte).flush();
    };
    for (size_t at = 0; at < header_end; ++at) {
      for (int bit = 0; bit < 8; ++bit) {
        put(at, static_cast<char>(good[at] ^ (1 << bit)));
        accepted += loads();
      }
      for (const char byte : {'\0', '"', '0', '9', ',', '}', ']', '-', ' ', '\xFF'}) {
        put(at, byte);
        accepted += loads();
      }
      put(at, good[at]);
    }
  }
  EXPECT_TRUE(loads());
  for (size_t n = good.size(); n-- > 0;) {
    std::filesystem::resize_file(path_, n);
    EXPECT_FALSE(loads()) << n;
  }
  EXPECT_GT(accepted, 0);  // another letter in a name is no damage one could see
}

// --- folders ---------------------------------------------------------------------------------

class SafetensorsShards : public ::testing::Test {
 protected:
  void shard(const std::string& file, const std::vector<std::string>& tensors) {
    SafetensorsWriter writer;
    for (const std::string& name : tensors) writer.add(name, DType::kF32, {2}, {1.0f, 2.0f});
    write_bytes(dir_ / file, writer.bytes());
  }
  void index(const std::string& weight_map) {
    write_bytes(dir_ / "model.safetensors.index.json",
                R"({"metadata":{"total_size":24},"weight_map":)" + weight_map + "}");
  }
  void expect_bad(std::initializer_list<std::string> words) {
    expect_error(ErrorKind::kBadData, words, [&] { SafetensorsFolder folder(dir_.path()); });
  }
  TempDir dir_;
};

TEST_F(SafetensorsShards, FindsTensorsInAllShards) {
  shard("one.safetensors", {"a", "b"});
  shard("two.safetensors", {"c"});
  index(R"({"a":"one.safetensors","b":"one.safetensors","c":"two.safetensors"})");
  const SafetensorsFolder folder(dir_.path());
  EXPECT_EQ(folder.names(), (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(folder.paths().size(), 2u);
  EXPECT_EQ(folder.n_bytes(), 24u);
  EXPECT_TRUE(folder.contains("c"));
  EXPECT_FALSE(folder.contains("d"));
  const TensorView view = folder.get("c", {2});
  EXPECT_EQ(to_f32(view), (std::vector<float>{1.0f, 2.0f}));
  folder.release(view.data, view.n_bytes());
  const std::vector<std::byte> elsewhere(100000, std::byte{7});
  folder.release(elsewhere.data(), elsewhere.size());
  EXPECT_EQ(elsewhere[50000], std::byte{7});
  EXPECT_EQ(to_f32(view), (std::vector<float>{1.0f, 2.0f}));
}

TEST_F(SafetensorsShards, ReadsASingleFileWithoutIndex) {
  shard("model.safetensors", {"a"});
  EXPECT_TRUE(SafetensorsFolder(dir_.path()).contains("a"));
}

TEST_F(SafetensorsShards, FolderWithoutWeightsSaysWhatIsRead) {
  expect_bad({dir_.path(), "model.safetensors", "safetensors only"});
}

TEST_F(SafetensorsShards, ListsAllMissingShardsAtOnce) {
  shard("one.safetensors", {"a"});
  index(R"({"a":"one.safetensors","b":"two.safetensors","c":"three.safetensors"})");
  expect_bad({"shards are missing", "two.safetensors", "three.safetensors"});
}

TEST_F(SafetensorsShards, RefusesShardNamesOutsideTheFolder) {
  for (const char* name : {"../x", "/etc/passwd", "a/b", "..", ".", "", "a\\\\b", "a\\u0000b"}) {
    SCOPED_TRACE(name);
    index(std::string("{\"a\":\"") + name + "\"}");
    expect_bad({"not a plain file name"});
  }
  index(R"({"a":1})");
  expect_bad({"a", "not a string"});
}

TEST_F(SafetensorsShards, ASymlinkLoopIsAMissingShard) {
  std::filesystem::create_symlink("loop.safetensors", dir_ / "loop.safetensors");
  index(R"({"a":"loop.safetensors"})");
  expect_bad({"missing", "loop.safetensors"});
}

TEST_F(SafetensorsShards, FollowsSymlinksAsTheHubCacheUsesThem) {
  shard("blob", {"a"});
  std::filesystem::create_symlink("blob", dir_ / "model.safetensors");
  EXPECT_TRUE(SafetensorsFolder(dir_.path()).contains("a"));
}

TEST_F(SafetensorsShards, ATensorInTwoShardsNamesBothFiles) {
  shard("one.safetensors", {"a", "b"});
  shard("two.safetensors", {"b"});
  index(R"({"a":"one.safetensors","b":"two.safetensors"})");
  expect_bad({"tensor b", "one.safetensors", "two.safetensors"});
}

TEST_F(SafetensorsShards, TheIndexMustTellTheTruth) {
  shard("one.safetensors", {"a"});
  shard("two.safetensors", {"b"});
  index(R"({"a":"two.safetensors","b":"one.safetensors"})");
  expect_bad({"tensor a", "one.safetensors", "the index says two.safetensors"});
  index(R"({"a":"one.safetensors","b":"two.safetensors","c":"two.safetensors"})");
  expect_bad({"tensor c is not in two.safetensors"});
}

TEST_F(SafetensorsShards, RefusesABrokenIndex) {
  shard("one.safetensors", {"a"});
  index("[]");
  expect_bad({"index.json", "weight_map"});
  index("{}");
  expect_bad({"weight_map"});
  write_bytes(dir_ / "model.safetensors.index.json", "{}");
  expect_bad({"weight_map"});
  write_bytes(dir_ / "model.safetensors.index.json", "{");
  expect_bad({"index.json", "line 1, column 2"});
}

TEST_F(SafetensorsShards, TwoSetsOfWeightsAreAmbiguous) {
  shard("one.safetensors", {"a"});
  shard("model.safetensors", {"a"});
  index(R"({"a":"one.safetensors"})");
  expect_bad({"two sets of weights"});
  index(R"({"a":"model.safetensors"})");  // an index of one shard is fine
  EXPECT_TRUE(SafetensorsFolder(dir_.path()).contains("a"));
}

TEST_F(SafetensorsShards, GetNamesTheTensorAndWhatIsWrongWithIt) {
  SafetensorsWriter writer;
  writer.add("a", DType::kF32, {2, 3}, std::vector<float>(6));
  writer.add("ids", "I64", {1}, std::string(8, '\0'));
  write_bytes(dir_ / "model.safetensors", writer.bytes());
  const SafetensorsFolder folder(dir_.path());
  const auto expect = [&](const char* name, std::initializer_list<std::string> words) {
    expect_error(ErrorKind::kBadData, words, [&] { folder.get(name, {3, 2}); });
  };
  expect("a", {"a is [2, 3]", "[3, 2]"});
  expect("b", {"missing", "b"});
  expect("ids", {"ids is I64", "F32, F16 or BF16"});
  expect_error(ErrorKind::kBadData, {"[2, 3]", "[6]"}, [&] { folder.get("a", {6}); });
}

}  // namespace
}  // namespace tq
