// test_process - tq beside the rest of a machine: closed descriptors, files that shrink or change
// while they are read, a second tq, pipes as texts, limits of file sizes.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>

#include "tests/cli.h"

namespace tq {
namespace {

namespace fs = std::filesystem;

class ProcessTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!fs::exists(TQ_BINARY)) GTEST_SKIP() << TQ_BINARY << " is not built";
    ::setenv("TQ", TQ_BINARY, 1);
    ::setenv("MODEL", copy_model(dir_).c_str(), 1);
    std::string text;
    for (int i = 0; i < 400; ++i) text += "Once upon a time there was a cat on a mat. ";
    write_bytes(dir_ / "calib.txt", text);
  }
  // A script of the shell, in the folder; its exit code.
  int sh(const std::string& script) {
    const std::string command = "cd " + dir_.path() + " && { " + script + "\n} 2>err.txt";
    const int status = std::system(command.c_str());
    err_ = read_bytes(dir_ / "err.txt");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  void expect_one_line(const std::string& words) {
    EXPECT_TRUE(err_.starts_with("tq: error: ")) << err_;
    EXPECT_EQ(std::count(err_.begin(), err_.end(), '\n'), 1) << err_;
    EXPECT_NE(err_.find(words), std::string::npos) << err_;
  }
  void expect_no_temporary_file() {
    for (const std::string& name : names_in(dir_.path())) {
      EXPECT_EQ(name.find(".tmp-"), std::string::npos) << name;
    }
  }
  // Long enough to be met at work; stages that begin with a folder of results.
  const std::string slow_ =
      "$TQ quantize $MODEL -o m.tq --calib calib.txt --calib-samples 8 --calib-length 64 "
      "--method spinquant --steps 60 --threads 1 -q";
  const std::string wait_for_work_ = "while [ ! -d m.tq.resume ]; do sleep 0.01; done; ";

  TempDir dir_;
  std::string err_;
};

TEST_F(ProcessTest, ClosedDescriptorsNeverReachAFile) {
  const std::string quantize = "$TQ quantize $MODEL --method rtn -o ";
  ASSERT_EQ(sh(quantize + "open.tq"), 0) << err_;
  const std::string expected = read_bytes(dir_ / "open.tq");
  for (const char* closed : {"2>&-", "1>&-", "0<&-", "0<&- 1>&- 2>&-"}) {
    EXPECT_EQ(sh(quantize + "closed.tq --force " + closed), 0) << closed;
    EXPECT_EQ(read_bytes(dir_ / "closed.tq"), expected) << closed;
  }
  ASSERT_EQ(sh("$TQ logits $MODEL --ids 1,2,3 -o open.npy"), 0) << err_;
  ASSERT_EQ(sh("$TQ logits $MODEL --ids 1,2,3 -o closed.npy 0<&- 1>&- 2>&-"), 0);
  EXPECT_EQ(read_bytes(dir_ / "open.npy"), read_bytes(dir_ / "closed.npy"));
  // Text that nobody can read was not written.
  EXPECT_EQ(sh("$TQ run $MODEL Once -n 4 --raw -q 1>&-"), 5);
  expect_one_line("stdout");
}

TEST_F(ProcessTest, AModelThatShrinksWhileItIsReadIsOneLineAndLeavesNothing) {
  edit_json(dir_ / "model/config.json", [](Json& c) { c["max_position_embeddings"] = 60000; });
  std::string ids = "1";
  for (int i = 0; i < 20000; ++i) ids += ",5";
  write_bytes(dir_ / "ids", ids);
  EXPECT_EQ(sh("$TQ logits $MODEL --threads 1 --ids $(cat ids) -o out.npy & p=$!; "
               "while ! ls out.npy.tmp-* >/dev/null 2>&1; do sleep 0.01; done; "
               "truncate -s 5000 $MODEL/model.safetensors; wait $p"),
            5);
  expect_one_line("became shorter");
  EXPECT_NE(err_.find("model.safetensors"), std::string::npos) << err_;
  expect_no_temporary_file();
}

TEST_F(ProcessTest, ASourceThatChangesWhileItIsQuantizedIsAnError) {
  EXPECT_EQ(sh(slow_ + " & p=$!; " + wait_for_work_ + "touch $MODEL/model.safetensors; wait $p"),
            5);
  expect_one_line("changed while it was read");
  EXPECT_FALSE(fs::exists(dir_ / "m.tq"));
  expect_no_temporary_file();
}

TEST_F(ProcessTest, ASecondRunIntoOneOutputIsRefused) {
  ASSERT_EQ(sh(slow_ + "; mv m.tq expected.tq"), 0) << err_;
  EXPECT_EQ(sh(slow_ + " & p=$!; " + wait_for_work_ + slow_ + "; code=$?; " + slow_ +
               " --resume 2>/dev/null; second=$?; wait $p && [ $second = 5 ] && exit $code"),
            5);
  expect_one_line("another tq");
  EXPECT_EQ(read_bytes(dir_ / "m.tq"), read_bytes(dir_ / "expected.tq"));
}

TEST_F(ProcessTest, KilledAnywhereAndResumedGivesTheSameBytes) {
  ASSERT_EQ(sh(slow_ + "; mv m.tq expected.tq"), 0) << err_;
  int n_kills = 0;
  for (int milliseconds : {150, 250, 350, 450}) {
    const std::string seconds = "0." + std::to_string(milliseconds);
    n_kills += sh("timeout -s KILL " + seconds + " " + slow_ + " --resume") != 0;
    n_kills += sh("timeout -s INT " + seconds + " " + slow_ + " --resume --force") != 0;
  }
  EXPECT_GT(n_kills, 1);
  ASSERT_EQ(sh(slow_ + " --resume --force"), 0) << err_;
  EXPECT_EQ(read_bytes(dir_ / "m.tq"), read_bytes(dir_ / "expected.tq"));
  expect_no_temporary_file();
  EXPECT_FALSE(fs::exists(dir_ / "m.tq.resume"));
}

TEST_F(ProcessTest, AReportThatCannotBeWrittenLeavesTheModelAndSaysSo) {
  EXPECT_EQ(sh(slow_ + " --report r.json & p=$!; " + wait_for_work_ + "mkdir r.json; wait $p"), 5);
  expect_one_line("the model m.tq is complete");
  EXPECT_EQ(sh("$TQ verify m.tq >/dev/null"), 0) << err_;
}

TEST_F(ProcessTest, TextsMayComeThroughPipes) {
  const std::string quantize =
      "$TQ quantize $MODEL --method gptq --calib-samples 4 --calib-length 64 -q ";
  ASSERT_EQ(sh(quantize + "-o file.tq --calib calib.txt"), 0) << err_;
  ASSERT_EQ(sh("mkfifo pipe; cat calib.txt >pipe & " + quantize + "-o pipe.tq --calib pipe"), 0);
  EXPECT_EQ(read_bytes(dir_ / "pipe.tq"), read_bytes(dir_ / "file.tq"));
  ASSERT_EQ(sh("cat calib.txt >pipe & $TQ tokenize $MODEL --file pipe --json >pipe.json; "
               "$TQ tokenize $MODEL --file calib.txt --json >file.json; cmp pipe.json file.json"),
            0);
}

TEST_F(ProcessTest, ALimitOfFileSizesIsAFullDisk) {
  EXPECT_EQ(sh("ulimit -f 100; $TQ quantize $MODEL -o m.tq --method rtn -q"), 5);
  expect_one_line("m.tq");
  expect_no_temporary_file();
}

TEST_F(ProcessTest, ADamagedFileIsNotRunUnlessAskedTo) {
  ASSERT_EQ(sh("$TQ quantize $MODEL -o m.tq --method rtn -q"), 0) << err_;
  std::string bytes = read_bytes(dir_ / "m.tq");
  bytes[bytes.size() / 2] ^= 1;
  write_bytes(dir_ / "m.tq", bytes);
  EXPECT_EQ(sh("$TQ run m.tq Once -n 4 --raw -q"), 3);
  expect_one_line("checksum of tensor");
  EXPECT_EQ(sh("$TQ run m.tq Once -n 4 --raw -q --no-verify >/dev/null"), 0) << err_;
  EXPECT_EQ(sh("$TQ inspect m.tq >/dev/null && $TQ tokenize m.tq --text x >/dev/null"), 0) << err_;
}

TEST_F(ProcessTest, OutputsAreNeverDescriptors) {
  for (const char* name : {"/dev/stdout", "/proc/self/fd/1", "/dev/fd/1"}) {
    EXPECT_EQ(sh(std::string("$TQ logits $MODEL --ids 1 -o ") + name + " >out.npy"), 5);
    expect_one_line("open descriptor");
    EXPECT_EQ(sh(std::string("$TQ quantize $MODEL --method rtn --force -o ") + name + " >out.tq"),
              5);
    EXPECT_EQ(read_bytes(dir_ / "out.tq"), "");
  }
}

TEST_F(ProcessTest, AHeaderOfAMillionTensorsTakesLittleMemory) {
  std::string header = "{";
  for (int i = 0; header.size() < 20'000'000; ++i) {
    header += (i ? ",\"" : "\"") + std::to_string(i) +
              R"(":{"dtype":"I8","shape":[0],"data_offsets":[0,0]})";
  }
  Safetensors::write(dir_ / "model/model.safetensors", header + "}", "");
  const CliResult result = run_tq(dir_, logits_of(dir_, dir_ / "model"));
  EXPECT_EQ(result.exit_code, 3);
  EXPECT_NE(result.err.find("weight is missing"), std::string::npos) << result.err;
  EXPECT_LT(result.max_rss_mb, 300);
  EXPECT_LT(result.cpu_seconds, 10);
  // Long lists where none belong.
  std::string zeros = "0";
  while (zeros.size() < 20'000'000) zeros += ",0";
  Safetensors::write(dir_ / "model/model.safetensors",
                     R"({"a":{"dtype":"I8","shape":[)" + zeros + R"(],"data_offsets":[0,0]}})", "");
  const CliResult refused = run_tq(dir_, logits_of(dir_, dir_ / "model"));
  EXPECT_EQ(refused.exit_code, 3);
  EXPECT_LT(refused.max_rss_mb, 300);
}

}  // namespace
}  // namespace tq
