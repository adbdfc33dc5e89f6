// `tq quantize` as a user meets it: exit codes, one-line errors, nothing left behind.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <algorithm>
#include <filesystem>

#include "model/json.h"
#include "model/tq_file.h"
#include "tests/temp_dir.h"

namespace tq {
namespace {

const std::string kModel = std::string(TQ_FIXTURES) + "/random-models/llama-tied-bf16-sharded";

struct Outcome {
  int code = 0;
  std::string out, err;
};

class QuantizeCli : public testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(TQ_BINARY)) GTEST_SKIP() << TQ_BINARY << " is not built";
    // 24 characters of the fixtures' alphabet, over and over.
    std::string text;
    for (int i = 0; i < 60; ++i) text += "the cat sat on a mat and ";
    write_bytes(folder_ / "calib.txt", text);
  }

  // `prefix` goes before the command, for limits of the shell.
  Outcome run(const std::string& arguments, const std::string& prefix = "",
              const std::string& verb = "quantize") {
    const std::string command = prefix + TQ_BINARY + " " + verb + " " + arguments + " >" +
                                (folder_ / "out") + " 2>" + (folder_ / "err");
    const int status = std::system(command.c_str());
    Outcome result;
    result.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    result.out = read_bytes(folder_ / "out");
    result.err = read_bytes(folder_ / "err");
    std::filesystem::remove(folder_ / "out");
    std::filesystem::remove(folder_ / "err");
    return result;
  }

  // A failure: this exit code, one line that mentions `text`, nothing on stdout, no file appears.
  void expect_failure(int code, const std::string& arguments, const std::string& text,
                      const std::string& prefix = "") {
    const auto before = names_in(folder_.path());
    const Outcome result = run(arguments, prefix);
    EXPECT_EQ(result.code, code) << arguments << "\n" << result.err;
    EXPECT_EQ(result.out, "") << arguments;
    EXPECT_TRUE(result.err.starts_with("tq: error: ")) << result.err;
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
    EXPECT_NE(result.err.find(text), std::string::npos) << result.err;
    EXPECT_EQ(names_in(folder_.path()), before) << arguments;
  }

  std::string output() { return " -o " + (folder_ / "m.tq"); }
  // Options under which GPTQ runs on a fixture of a few tokens.
  std::string calib() {
    return " --calib " + (folder_ / "calib.txt") + " --calib-length 32 --calib-samples 4";
  }
  // The method with the most stages, with little to do.
  std::string learned() {
    return calib() + " --method twinquant --rank 8 --steps 4 --refine-steps 2";
  }

  TempDir folder_;
};

TEST_F(QuantizeCli, WritesAVerifiedFileAndAReport) {
  const Outcome result =
      run(kModel + output() + learned() + " --group 32 --report " + (folder_ / "report.json"));
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.out, "");
  EXPECT_GT(verify_tq_file(folder_ / "m.tq"), 0);
  const Json report = parse_json(read_bytes(folder_ / "report.json"), "report");
  EXPECT_EQ(report["linears"].size(), 21u);
  const bool refined = report["refine"]["kept"].get<bool>();
  // What is reported of the scales as they were is not said of those that ship.
  const Json& first = report["linears"][0];
  EXPECT_EQ(first.contains("before_refinement"), refined);
  EXPECT_EQ(first.contains("output_snr_db"), !refined);
  EXPECT_GT((refined ? first["before_refinement"] : first)["output_snr_db"].get<double>(), 5);
  EXPECT_EQ(report["basis_losses"].size(), 4u);
  EXPECT_EQ(report["refine"]["kl"].size(), 2u);
  EXPECT_EQ(report["file_bytes"].get<uint64_t>(), std::filesystem::file_size(folder_ / "m.tq"));
}

TEST_F(QuantizeCli, EveryMethodWorksOnEveryArchitecture) {
  for (const auto& entry :
       std::filesystem::directory_iterator(std::string(TQ_FIXTURES) + "/random-models")) {
    if (!entry.is_directory()) continue;
    for (const std::string method :
         {"none", "rtn", "svdquant --rank 4", "gptq", "quarot", "spinquant --steps 2",
          "spinquant --steps 2 --loss ce --act-codes asymmetric --bits-a 4",
          "respinquant --steps 2 --basis-rank 4", "respinquant --steps 2 --basis-rank full",
          "twinquant --steps 2 --refine-steps 1 --rank 4",
          "twinquant --steps 2 --refine-steps 0 --rank 4 --split svd --bits-a 4"}) {
      const bool calibrated = method.find("quant --steps") != std::string::npos ||
                              method == "gptq" || method == "quarot";
      const Outcome result =
          run(entry.path().string() + output() + " --force -q --threads 1 --method " + method +
              (calibrated ? calib() : ""));
      EXPECT_EQ(result.code, 0) << entry.path() << " " << method << ": " << result.err;
      EXPECT_EQ(result.err, "");
      EXPECT_GT(verify_tq_file(folder_ / "m.tq"), 0);
    }
  }
}

TEST_F(QuantizeCli, ThreeBitsTakeTheSpaceOfFour) {
  double bits[2];
  for (int width : {3, 4}) {
    const std::string n = std::to_string(width), report = folder_ / ("report" + n + ".json");
    const Outcome result = run(kModel + output() + " --force --method rtn --bits-w " + n +
                               " --bits-a " + n + " --report " + report);
    ASSERT_EQ(result.code, 0) << result.err;
    bits[width - 3] = parse_json(read_bytes(report), report)["bits_per_weight"].get<double>();
    EXPECT_EQ(load_tq_file(folder_ / "m.tq").layers[0].wq.act.bits, width);
  }
  EXPECT_EQ(bits[0], bits[1]);
}

TEST_F(QuantizeCli, KvBitsOfTheFileAreTheDefaultAndCanBeOverridden) {
  const std::string file = folder_ / "m.tq";
  ASSERT_EQ(run(kModel + output() + " --method none --kv-bits 4").code, 0);
  const Outcome inspected = run(file + " --json", "", "inspect");
  const Json json = parse_json(inspected.out, "inspect");
  EXPECT_EQ(json["kv_bits"], 4);
  const auto bits_of = [&](const std::string& arguments) {
    const Outcome result =
        run(file + " --ctx 32 --json --text " + (folder_ / "calib.txt") + arguments, "", "eval");
    EXPECT_EQ(result.code, 0) << result.err;
    return parse_json(result.out, "eval");
  };
  const Json by_default = bits_of(""), four = bits_of(" --kv-bits 4"),
             full = bits_of(" --kv-bits 32");
  EXPECT_EQ(by_default["kv_bits"], 4);
  EXPECT_EQ(by_default["ppl"], four["ppl"]);
  EXPECT_EQ(full["kv_bits"], 32);
  EXPECT_NE(full["ppl"], four["ppl"]);
  for (const char* verb : {"run", "eval", "logits", "bench"}) {
    const Outcome refused = run(file + " --kv-bits 5", "", verb);
    EXPECT_EQ(refused.code, 2) << verb;
    EXPECT_NE(refused.err.find("--kv-bits"), std::string::npos) << refused.err;
  }
}

TEST_F(QuantizeCli, TwoRunsGiveTheSameBytes) {
  ASSERT_EQ(run(kModel + output() + learned() + " --threads 1").code, 0);
  const std::string first = read_bytes(folder_ / "m.tq");
  ASSERT_EQ(run(kModel + output() + learned() + " --threads 2 --force").code, 0);
  EXPECT_EQ(read_bytes(folder_ / "m.tq"), first);
  EXPECT_EQ(first.find("/random-models"), std::string::npos);  // no paths in the file
}

TEST_F(QuantizeCli, DryRunWritesNothing) {
  const auto before = names_in(folder_.path());
  const Outcome result = run(kModel + output() + learned() + " --dry-run");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_NE(result.err.find("bits each"), std::string::npos);
  EXPECT_EQ(names_in(folder_.path()), before);
}

TEST_F(QuantizeCli, WrongOptionsAreUsageErrors) {
  expect_failure(2, kModel + output() + " --method magic", "methods: none, rtn");
  expect_failure(2, kModel + output() + " --bits-w 5", "--bits-w");
  expect_failure(2, kModel + output() + " --bits-a 5", "--bits-a");
  expect_failure(2, kModel + output() + " --kv-bits 32", "--kv-bits");
  expect_failure(2, kModel + output() + " --group 48", "--group");
  expect_failure(2, kModel + output() + " --group-a 48", "--group-a");
  expect_failure(2, kModel + output() + " --group-a token", "multiple of 32");  // heads of 8
  expect_failure(2, kModel + output() + " --act-codes asymmetric", "--bits-a 8");
  expect_failure(2, kModel + output() + " --loss ce --calib-length 1", "next one");
  expect_failure(2, kModel + output() + " --method svdquant --rank 33", "smallest side");
  expect_failure(2, kModel + output() + " --rank 8 --embed-bits 8 --head-bits 4", "stored once");
  expect_failure(2, kModel + output() + " --method rtn --calib-samples 3", "calibration options");
  expect_failure(2, kModel + output() + " --method rtn --device cuda", "calibration options");
  expect_failure(2, kModel + output() + learned() + " --device auto", "--device");
  expect_failure(2, kModel + output() + " --keep ''", "--keep is empty");
  expect_failure(2, kModel + output() + " --report ''", "is empty");
  expect_failure(2, kModel + " -o -", "must be a file");
  expect_failure(2, kModel + output() + " --keep nosuch", "--keep nosuch matches no linear");
  expect_failure(2, kModel + output() + " --keep w_down --keep layers.9.wq", "layers.9.wq matches");
  expect_failure(2, kModel + output() + " --keep '('", "not a regular expression");
  expect_failure(2, kModel + output() + " --keep '(.*)*(.*)*(.*)*x$'", "matches no linear");
  const std::string deep(100'000, '(');
  expect_failure(2, kModel + output() + " --keep '" + deep + "'", "at most 256");
  const std::string nested = std::string(120, '(') + "w_down" + std::string(120, ')');
  EXPECT_EQ(run(kModel + output() + " --method rtn --dry-run --keep '" + nested + "'").code, 0);
  expect_failure(2, kModel + output() + " --method none --bits-w 4", "contradicts");
  expect_failure(2, kModel + output() + " --method none --bits-w 3", "contradicts");
  expect_failure(2, kModel + output() + " --method quarot --branch-bits 8", "--branch-bits");
  expect_failure(2, kModel + output() + learned() + " --keep '('", "regular expression");
  expect_failure(2, kModel + output() + " --rank 8 --calib-length 257", "context");
  expect_failure(2, kModel + output() + " --seed -1", "--seed");
  expect_failure(2, kModel + output() + " --seed 99999999999999999999", "--seed");
  expect_failure(2, kModel, "--output");
}

// A report never takes the place of a model: not of the one being made, however it is spelt, and
// not of another.
TEST_F(QuantizeCli, AReportNeverReplacesAModel) {
  const std::string enter = "cd " + folder_.path() + " && ",
                    model = kModel + " --method rtn -q -o ";
  expect_failure(5, model + "m.tq --report ./m.tq", "the output itself", enter);
  expect_failure(5, model + "m.tq --report " + (folder_ / "m.tq"), "the output itself", enter);
  expect_failure(5, model + (folder_ / "m.tq") + " --report m.tq", "the output itself", enter);
  ASSERT_EQ(run(model + (folder_ / "good.tq")).code, 0);
  expect_failure(5, model + "m.tq --report good.tq", "it is a model", enter);
}

// Whoever reads the progress goes away, the work goes on; and a small stack is no reason to crash.
TEST_F(QuantizeCli, NeitherAClosedPipeNorASmallStackEndsIt) {
  const std::string arguments = kModel + calib() + " --method gptq --force";
  ASSERT_EQ(run(arguments + output()).code, 0);
  const std::string command = std::string("(") + TQ_BINARY + " quantize " + arguments + " -o " +
                              (folder_ / "piped.tq") + " 2>&1 | true)";
  EXPECT_EQ(std::system(command.c_str()), 0);
  const std::string small = std::string("ulimit -s 256; ");
  EXPECT_EQ(run(arguments + " -o " + (folder_ / "small.tq"), small).code, 0);
  for (const char* name : {"piped.tq", "small.tq"}) {
    EXPECT_EQ(read_bytes(folder_ / name), read_bytes(folder_ / "m.tq")) << name;
  }
}

// A file of JSON is its texts, whatever it is called; prose that begins with a bracket is prose.
TEST_F(QuantizeCli, CalibrationTextIsRecognisedByItsContent) {
  std::string prose, lines, list;
  for (int i = 0; i < 8; ++i) {
    const std::string paragraph = read_bytes(folder_ / "calib.txt").substr(0, 300 + 10 * i);
    const std::string object = R"({"text": ")" + paragraph + R"("})";
    prose += (prose.empty() ? "" : "\n\n") + paragraph;
    lines += object + "\r\n";
    list += (list.empty() ? "[" : ",\n ") + object;
  }
  const auto bytes = [&](const std::string& name, const std::string& content) {
    write_bytes(folder_ / name, content);
    const Outcome made = run(kModel + output() + " --force --method gptq --calib-length 32 " +
                             "--calib-samples 4 --calib " + (folder_ / name));
    EXPECT_EQ(made.code, 0) << name << made.err;
    return read_bytes(folder_ / "m.tq");
  };
  const std::string expected = bytes("prose.txt", prose);
  for (const char* name : {"c.jsonl", "C.JSONL", "c.json", "c.txt", "c"}) {
    EXPECT_EQ(bytes(name, lines), expected) << name;
    EXPECT_EQ(bytes(name, list + "]"), expected) << name;
  }
  EXPECT_EQ(bytes("bom.jsonl", "\xEF\xBB\xBF" + lines), expected);
  EXPECT_NE(bytes("note.txt", "[1] " + prose), expected);
  const auto refused = [&](const std::string& name, const std::string& content,
                           const std::string& why) {
    write_bytes(folder_ / name, content);
    std::filesystem::remove(folder_ / "m.tq");
    expect_failure(3, kModel + output() + " --method gptq --calib " + (folder_ / name), why);
  };
  refused("bad.json", prose, "line 1");
  refused("other.jsonl", R"({"content": "a"})", "\"text\"");
  refused("cut.jsonl", lines + R"({"text": "half)", "line 9");
  refused("numbers.json", "[1, 2]", "item 0");
}

TEST_F(QuantizeCli, FewerSamplesThanAskedForAreTold) {
  const Outcome few = run(kModel + output() + " --method gptq --calib-length 64 --calib " +
                          (folder_ / "calib.txt"));
  EXPECT_EQ(few.code, 0) << few.err;
  EXPECT_NE(few.err.find("samples of 64 tokens, 64 were asked for"), std::string::npos) << few.err;
  const Outcome enough = run(kModel + output() + calib() + " --force --method gptq");
  EXPECT_EQ(enough.err.find("were asked for"), std::string::npos) << enough.err;
}

TEST_F(QuantizeCli, ContradictionsOfLearnedMethodsAreUsageErrors) {
  struct Refusal {
    const char *options, *text;
  };
  for (const Refusal& refusal : {
           Refusal{"--method respinquant --basis-rank abc", "--basis-rank abc"},
           Refusal{"--method respinquant --basis-rank 8x", "--basis-rank 8x"},
           Refusal{"--method respinquant --basis-rank -1", "--basis-rank"},
           Refusal{"--method respinquant --basis-rank 33", "at most 32"},
           Refusal{"--method spinquant --basis-rank 8", "--basis layerwise"},
           Refusal{"--method quarot --steps 9", "--steps without a learned basis"},
           Refusal{"--method spinquant --steps 0", "--steps"},
           Refusal{"--method rtn --rank 8 --split fit", "--split fit"},
           Refusal{"--method rtn --act-order", "--act-order has no effect"},
           Refusal{"--method quarot --loss kl", "--loss without a learned basis"},
           Refusal{"--method twinquant --rank 8 --split svd --loss block", "--split svd"},
           Refusal{"--method rtn --split fit", "--split without a branch"},
           Refusal{"--method twinquant --rank 8 --branch-bits 16", "--branch-bits 16"},
           Refusal{"--method twinquant --branch-bits 5", "--branch-bits"},
           Refusal{"--method twinquant --rank 33", "smallest side"},
           Refusal{"--method twinquant --rank 8 --rounding rtn", "--split fit"},
           Refusal{"--method twinquant --bits-w 32 --refine-steps 4", "--refine-steps"},
           Refusal{"--method twinquant --bits-w 16 --rank 4", "--rank"},
           Refusal{"--method twinquant --rank 8 --calib-length 257", "context"},
       }) {
    expect_failure(2, kModel + output() + " " + refusal.options, refusal.text);
  }
}

TEST_F(QuantizeCli, UnfinishedWorkOfAnotherModelOrOtherOptionsIsRefused) {
  // A run that breaks off when it writes the model: what is kept for later is in smaller files.
  const std::string unfinished = output() + learned();
  ASSERT_EQ(run(kModel + unfinished + " -q", "ulimit -f 40; trap '' XFSZ; ").code, 5);
  ASSERT_TRUE(std::filesystem::exists(folder_ / "m.tq.resume"));
  const std::string other = std::string(TQ_FIXTURES) + "/random-models/llama3-rope-f16";
  const std::string no_match = "resume data does not match: ";
  expect_failure(3,
                 kModel + output() + calib() +
                     " --method twinquant --rank 8 --refine-steps 2 --resume --steps 5",
                 no_match + "steps");
  expect_failure(3, kModel + unfinished + " --resume --seed 1", no_match + "seed");
  expect_failure(3, other + unfinished + " --resume", no_match);
  EXPECT_EQ(run(kModel + unfinished + " --resume").code, 0);
  EXPECT_FALSE(std::filesystem::exists(folder_ / "m.tq.resume"));
}

TEST_F(QuantizeCli, WrongInputsAreRefused) {
  expect_failure(5, (folder_ / "nothing") + output(), "nothing");
  expect_failure(5, kModel + output() + " --rank 8 --calib " + (folder_ / "none.txt"), "none.txt");
  write_bytes(folder_ / "empty.txt", "");
  expect_failure(3, kModel + output() + " --rank 8 --calib " + (folder_ / "empty.txt"), "empty");
  write_bytes(folder_ / "latin1.txt", "caf\xe9 au lait");
  expect_failure(3, kModel + output() + " --rank 8 --calib " + (folder_ / "latin1.txt"), "UTF-8");
  write_bytes(folder_ / "short.txt", "the cat");
  expect_failure(
      3, kModel + output() + " --rank 8 --calib-length 200 --calib " + (folder_ / "short.txt"),
      "too short");
  ASSERT_EQ(run(kModel + output() + " --method rtn").code, 0);
  expect_failure(3, (folder_ / "m.tq") + " -o " + (folder_ / "n.tq"), "already quantized");
}

TEST_F(QuantizeCli, OutputIsNeverOverwrittenUnasked) {
  write_bytes(folder_ / "m.tq", "precious");
  expect_failure(5, kModel + output() + " --method rtn", "--force");
  EXPECT_EQ(read_bytes(folder_ / "m.tq"), "precious");
  expect_failure(5, kModel + " --method rtn -o " + (folder_ / "none/m.tq"), "none");
  expect_failure(5, kModel + " --method rtn --force -o " + kModel + "/model.safetensors.index.json",
                 "input");
  expect_failure(
      5, kModel + " --method rtn -o " + (folder_ / "n.tq") + " --report " + (folder_ / "./n.tq"),
      "output itself");
  // A failed run with --force leaves the old file as it was.
  expect_failure(5, kModel + output() + " --rank 8 --force --calib " + (folder_ / "none.txt"),
                 "none.txt");
  EXPECT_EQ(read_bytes(folder_ / "m.tq"), "precious");
}

TEST_F(QuantizeCli, AFullDiskLeavesNothing) {
  // RLIMIT_FSIZE in blocks of 1024 bytes stands in for a full disk.
  expect_failure(5, kModel + output() + " --method none", "m.tq", "ulimit -f 20; trap '' XFSZ; ");
}

TEST_F(QuantizeCli, WeightsThatAreNotFiniteAreRefused) {
  const std::string copy = folder_ / "model";
  std::filesystem::copy(kModel, copy);
  const std::string shard = copy + "/model-00001-of-00002.safetensors";
  std::filesystem::permissions(shard, std::filesystem::perms::owner_write,
                               std::filesystem::perm_options::add);
  std::string bytes = read_bytes(shard);
  bytes[bytes.size() - 1] = '\x7f';  // the last bf16 becomes NaN
  bytes[bytes.size() - 2] = '\xff';
  write_bytes(shard, bytes);
  expect_failure(3, copy + output() + " --method rtn", "1 values, the first at index");
}

}  // namespace
}  // namespace tq
