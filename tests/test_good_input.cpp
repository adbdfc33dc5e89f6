// Unusual input that must keep working, the positive twins of test_bad_input.cpp; what goes to
// which stream; limits of time and memory.
#include <gtest/gtest.h>

#include <cmath>

#include "model/tensor.h"
#include "tests/cli.h"

namespace tq {
namespace {

std::string logits(const TempDir& dir, const std::string& model) {
  const CliResult result = run_tq(dir, logits_of(dir, model));
  EXPECT_EQ(result.exit_code, 0) << result.err;
  return read_bytes(dir / "out.npy");
}

std::string quantized(const TempDir& dir, const std::string& model, const std::string& name) {
  const CliResult result =
      run_tq(dir, {"quantize", model, "-o", dir / name, "--method", "rtn", "-q"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  return read_bytes(dir / name);
}

TEST(GoodInput, HeaderMayBePaddedWithWhitespaceOnEitherSide) {
  TempDir dir;
  const std::string model = copy_model(dir);
  const std::string expected = logits(dir, model);
  const Safetensors w = Safetensors::read(model + "/model.safetensors");
  Safetensors::write(model + "/model.safetensors", " \n" + w.header.dump() + " \t\r\n   ", w.data);
  EXPECT_EQ(logits(dir, model), expected);
}

TEST(GoodInput, UnalignedTensorsAreRead) {
  TempDir dir;
  const std::string model = copy_model(dir);
  const std::string expected = logits(dir, model);
  const Safetensors w = Safetensors::read(model + "/model.safetensors");
  std::string header = w.header.dump();
  header += std::string(1 + (4 - (8 + header.size()) % 4), ' ');
  Safetensors::write(model + "/model.safetensors", header, w.data);
  EXPECT_EQ(logits(dir, model), expected);
}

TEST(GoodInput, ShardedAndSingleGiveTheSameTqFile) {
  TempDir dir;
  EXPECT_EQ(quantized(dir, copy_model(dir), "a.tq"), quantized(dir, shard_model(dir), "b.tq"));
}

TEST(GoodInput, OffsetsMayBeInAnotherOrderThanNames) {
  TempDir dir;
  const std::string model = copy_model(dir);
  const std::string expected = logits(dir, model);
  const Safetensors w = Safetensors::read(model + "/model.safetensors");
  Safetensors reversed;
  std::vector<std::string> names;
  for (const auto& item : w.header.items()) {
    if (item.key() != "__metadata__") names.push_back(item.key());
  }
  for (const std::string& name : names) reversed.header[name] = Json();
  for (auto it = names.rbegin(); it != names.rend(); ++it) {
    Json entry = w.header[*it];
    const size_t begin = entry["data_offsets"][0], end = entry["data_offsets"][1];
    entry["data_offsets"] = {reversed.data.size(), reversed.data.size() + end - begin};
    reversed.data += w.data.substr(begin, end - begin);
    reversed.header[*it] = entry;
  }
  reversed.write(model + "/model.safetensors");
  EXPECT_EQ(logits(dir, model), expected);
}

TEST(GoodInput, TheSameValuesInF32F16AndBf16GiveTheSameLogits) {
  TempDir dir;
  // Values that all three types hold exactly: rounded to bf16, and not below f16's normal range.
  const auto store = [&](const std::string& name, const std::string& dtype) {
    const std::string model = copy_model(dir, name);
    const Safetensors w = Safetensors::read(model + "/model.safetensors");
    Safetensors out;
    for (const auto& item : w.header.items()) {
      if (item.key() == "__metadata__") continue;
      Json entry = item.value();
      const size_t begin = entry["data_offsets"][0], end = entry["data_offsets"][1];
      const size_t start = out.data.size();
      for (size_t i = begin; i < end; i += 4) {
        float value;
        std::memcpy(&value, w.data.data() + i, 4);
        if (std::abs(value) < 1e-4f) value = 0;
        value = bf16_to_f32(f32_to_bf16(value));
        const uint16_t half = dtype == "F16" ? f32_to_f16(value) : f32_to_bf16(value);
        const char* bytes = dtype == "F32" ? reinterpret_cast<const char*>(&value)
                                           : reinterpret_cast<const char*>(&half);
        out.data.append(bytes, dtype == "F32" ? 4 : 2);
      }
      entry["dtype"] = dtype;
      entry["data_offsets"] = {start, out.data.size()};
      out.header[item.key()] = entry;
    }
    out.write(model + "/model.safetensors");
    return logits(dir, model);
  };
  const std::string f32 = store("f32", "F32");
  EXPECT_EQ(store("f16", "F16"), f32);
  EXPECT_EQ(store("bf16", "BF16"), f32);
}

TEST(GoodInput, PairAndStringMergesGiveTheSameIds) {
  TempDir dir;
  const std::string model = copy_model(dir);
  const Args tokenize = {"tokenize", model, "--text", "Once upon a time, there was", "--json"};
  const CliResult strings = run_tq(dir, tokenize);
  ASSERT_EQ(strings.exit_code, 0) << strings.err;
  edit_json(model + "/tokenizer.json", [](Json& t) {
    for (Json& merge : t["model"]["merges"]) {
      const std::string text = merge;
      const size_t space = text.find(' ', 1);
      merge = Json::array({text.substr(0, space), text.substr(space + 1)});
    }
  });
  EXPECT_EQ(run_tq(dir, tokenize).out, strings.out);
}

TEST(GoodInput, TiedModelMayCarryAnEqualHead) {
  TempDir dir;
  const std::string model = copy_model(dir);
  const std::string expected = logits(dir, model);
  Safetensors w = Safetensors::read(model + "/model.safetensors");
  const Json embed = w.header["model.embed_tokens.weight"];
  const size_t begin = embed["data_offsets"][0], end = embed["data_offsets"][1];
  w.header["lm_head.weight"] = embed;
  w.header["lm_head.weight"]["data_offsets"] = {w.data.size(), w.data.size() + end - begin};
  w.data += w.data.substr(begin, end - begin);
  w.write(model + "/model.safetensors");
  EXPECT_EQ(logits(dir, model), expected);
}

TEST(GoodInput, AllZeroWeightMatrixQuantizesAndRuns) {
  TempDir dir;
  const std::string model = copy_model(dir);
  Safetensors w = Safetensors::read(model + "/model.safetensors");
  for (size_t i = 0; i < 64 * 64; ++i) set_f32(w, "model.layers.0.self_attn.q_proj.weight", i, 0);
  w.write(model + "/model.safetensors");
  quantized(dir, model, "z.tq");
  logits(dir, dir / "z.tq");
}

TEST(GoodInput, CalibrationFromTextAndFromJsonLinesIsTheSame) {
  TempDir dir;
  const std::string story =
      "Once upon a time, there was a little girl named Lily. She loved to play.";
  std::string text, lines;
  for (int i = 0; i < 40; ++i) {
    text += (i ? "\n\n" : "") + story;
    lines += Json{{"text", story}, {"id", i}}.dump() + "\n";
  }
  write_bytes(dir / "c.txt", text);
  write_bytes(dir / "c.jsonl", lines);
  const std::string model = copy_model(dir);
  const auto with = [&](const std::string& calib, const std::string& name) {
    const CliResult result =
        run_tq(dir, {"quantize", model, "-o", dir / name, "--method", "gptq", "-q", "--calib",
                     dir / calib, "--calib-samples", "4", "--calib-length", "64"});
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return read_bytes(dir / name);
  };
  EXPECT_EQ(with("c.txt", "a.tq"), with("c.jsonl", "b.tq"));
}

// --- Streams and limits ------------------------------------------------------------------------

TEST(Streams, StdoutIsTheTextAndOneNewline) {
  TempDir dir;
  const CliResult result =
      run_tq(dir, {"run", copy_model(dir), "Once upon a time", "--temp", "0", "-n", "8", "-v"});
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(result.out, ", there was a little girl\n");
  EXPECT_NE(result.err.find("tok/s"), std::string::npos);
}

TEST(Streams, PromptFromStdin) {
  TempDir dir;
  CliOptions options;
  options.stdin_text = "Once upon a time";
  const CliResult result =
      run_tq(dir, {"run", copy_model(dir), "-", "--temp", "0", "-n", "8", "-q"}, options);
  EXPECT_EQ(result.out, ", there was a little girl\n");
  EXPECT_EQ(result.err, "");
}

TEST(Streams, StopTextEndsTheOutputBeforeIt) {
  TempDir dir;
  const CliResult result = run_tq(dir, {"run", copy_model(dir), "Once upon a time", "--temp", "0",
                                        "-n", "30", "-q", "--stop", "little"});
  EXPECT_EQ(result.out, ", there was a \n");
}

TEST(Streams, SameSeedSameText) {
  TempDir dir;
  const Args args = {"run", copy_model(dir), "Once", "-n", "20", "--temp",
                     "1",   "--seed",        "5",    "-q"};
  EXPECT_EQ(run_tq(dir, args).out, run_tq(dir, args).out);
}

TEST(Streams, ThreadsDoNotChangeTheLogits) {
  TempDir dir;
  write_bytes(dir / "m.tq", tq_bytes());
  Args args = logits_of(dir, dir / "m.tq");
  args.insert(args.end(), {"--threads", "1"});
  run_tq(dir, args);
  const std::string one = read_bytes(dir / "out.npy");
  args.back() = "3";
  run_tq(dir, args);
  EXPECT_EQ(read_bytes(dir / "out.npy"), one);
  EXPECT_GT(one.size(), 3u * 512 * 4);
}

TEST(Limits, HeaderErrorsAreFastAndSmall) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "AddressSanitizer's shadow memory counts as resident memory";
#endif
  TempDir dir;
  const std::string model = copy_model(dir);
  // A sparse file of 10 GB whose header claims to be 90 MB long.
  const uint64_t n = 90'000'000;
  write_bytes(model + "/model.safetensors", std::string(reinterpret_cast<const char*>(&n), 8));
  std::filesystem::resize_file(model + "/model.safetensors", uint64_t{10} << 30);
  const CliResult result = run_tq(dir, logits_of(dir, model));
  EXPECT_EQ(result.exit_code, 3) << result.err;
  EXPECT_LT(result.max_rss_mb, 100);
  EXPECT_LT(result.cpu_seconds, 1.0);
}

}  // namespace
}  // namespace tq
