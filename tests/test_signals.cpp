// test_signals - the first signal ends every command within half a second, wherever it is; ignored
// ones stay ignored. Memory that is asked for before it is taken is in test_memory.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "tests/process.h"

namespace tq {
namespace {

using Clock = std::chrono::steady_clock;

// Half a second, and what a busy machine takes to start and end a process.
constexpr double kMaxSeconds = 2.5;

void sleep_ms(int milliseconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
}

// Sends the signal after a while; the process must end with 130 and one line, soon.
void expect_interrupted(Process& process, int signal, int after_ms) {
  sleep_ms(after_ms);
  const auto start = Clock::now();
  process.send(signal);
  EXPECT_TRUE(process.wait_for("tq: error: interrupted ("));
  EXPECT_TRUE(process.wait_for("\n"));
  std::string rest;
  EXPECT_EQ(process.finish(&rest), 130);
  EXPECT_EQ(rest, "");
  EXPECT_LT(std::chrono::duration<double>(Clock::now() - start).count(), kMaxSeconds);
}

// stories260k with a context that a long prompt fits into.
std::string long_model(const TempDir& dir) {
  const std::string model = copy_model(dir);
  edit_json(model + "/config.json", [](Json& c) { c["max_position_embeddings"] = 4'000'000; });
  return model;
}

std::string long_text(const TempDir& dir, size_t bytes) {
  std::string text;
  while (text.size() < bytes) text += "Once upon a time, there was a little girl named Lily. ";
  write_bytes(dir / "long.txt", text);
  return dir / "long.txt";
}

TEST(Signals, OneThatWasIgnoredAtTheStartStaysIgnored) {
  TempDir dir;
  Process process(slow_quantize(dir), false, {.ignored_signal = SIGHUP});
  ASSERT_TRUE(process.wait_for("layer 1/5 done"));
  process.send(SIGHUP);
  EXPECT_EQ(process.finish(), 0);
  EXPECT_TRUE(std::filesystem::exists(dir / "m.tq"));
}

TEST(Signals, WaitingForAPromptOnStdinEndsAtOnce) {
  for (int signal : {SIGINT, SIGTERM, SIGHUP}) {
    TempDir dir;
    Process process({"run", copy_model(dir), "-"}, false, {.open_stdin = true});
    expect_interrupted(process, signal, 300);
  }
}

TEST(Signals, AnIdleChatEndsAtOnce) {
  TempDir dir;
  Process process({"chat", copy_model(dir), "--template", "chatml-smollm2", "-q"}, false,
                  {.open_stdin = true});
  expect_interrupted(process, SIGTERM, 500);
}

TEST(Signals, ALongPrefillStops) {
  TempDir dir;
  Process process({"run", long_model(dir), "-f", long_text(dir, 400'000), "--ctx", "300000", "-q"});
  expect_interrupted(process, SIGINT, 1500);
}

TEST(Signals, ALongTextStopsBeingTokenized) {
  TempDir dir;
  Process process({"tokenize", copy_model(dir), "--file", long_text(dir, 60'000'000), "--json"});
  expect_interrupted(process, SIGINT, 600);
}

TEST(Signals, LogitsStopAndLeaveNothing) {
  TempDir dir;
  const std::string model = long_model(dir);
  std::string ids = "1";
  for (int i = 0; i < 20'000; ++i) ids += ",300";
  Process process({"logits", model, "--ids", ids, "-o", dir / "out.npy"});
  expect_interrupted(process, SIGINT, 600);
  EXPECT_FALSE(std::filesystem::exists(dir / "out.npy"));
  for (const auto& entry : std::filesystem::directory_iterator(dir.path())) {
    EXPECT_EQ(entry.path().string().find(".tmp-"), std::string::npos) << entry.path();
  }
}

TEST(Signals, EvalStopsInTheMiddleOfAWindow) {
  TempDir dir;
  Process process(
      {"eval", long_model(dir), "--text", long_text(dir, 400'000), "--ctx", "100000", "-q"});
  expect_interrupted(process, SIGINT, 1500);
}

TEST(Signals, LearningAndRoundingStop) {
  TempDir dir;
  Args args = slow_quantize(dir);
  std::replace(args.begin(), args.end(), std::string("gptq"), std::string("twinquant"));
  std::replace(args.begin(), args.end(), std::string("120"), std::string("4"));
  args.insert(args.end(), {"--steps", "400"});
  Process process(args);
  ASSERT_TRUE(process.wait_for("tq: learning"));
  expect_interrupted(process, SIGINT, 50);
}

}  // namespace
}  // namespace tq
