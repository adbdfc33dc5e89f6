// test_shell - tq beside a shell: signals, pipes, a terminal, help and completion. Wrong command
// lines are in test_bad_input.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "tests/cli.h"
#include "tests/process.h"

namespace tq {
namespace {

using Args = std::vector<std::string>;

// stories260k with a long context, so that generating takes a while.
std::string talkative_model(const TempDir& dir) {
  const std::string model = copy_model(dir);
  edit_json(model + "/config.json", [](Json& c) { c["max_position_embeddings"] = 60000; });
  return model;
}

const Args kEndless = {"--ctx", "60000", "-n", "50000", "--ignore-eos", "--threads", "1"};

Args endless(Args args) {
  args.insert(args.end(), kEndless.begin(), kEndless.end());
  return args;
}

// The turn markers of ChatML in place of two words that nothing else is merged from.
std::string chat_model(const TempDir& dir) {
  const std::string model = talkative_model(dir);
  edit_json(model + "/tokenizer.json", [](Json& t) {
    Json &vocab = t["model"]["vocab"], &merges = t["model"]["merges"];
    const std::string pairs[][2] = {{"\u2581Timmy", "<|im_start|>"}, {"\u2581upon", "<|im_end|>"}};
    for (const auto& [word, marker] : pairs) {
      Json kept = Json::array();
      for (const Json& merge : merges) {
        std::string made = merge;
        made.erase(made.find(' '), 1);
        if (made != word) kept.push_back(merge);
      }
      merges = kept;
      const int id = vocab.at(word);
      vocab.erase(word);
      vocab[marker] = id;
      t["added_tokens"].push_back({{"id", id},
                                   {"content", marker},
                                   {"single_word", false},
                                   {"lstrip", false},
                                   {"rstrip", false},
                                   {"normalized", false},
                                   {"special", true}});
    }
  });
  return model;
}

TEST(Signals, InterruptedQuantizeLeavesNoFileAndResumes) {
  TempDir dir;
  Args args = slow_quantize(dir);
  ASSERT_EQ(run_tq(dir, args).exit_code, 0);
  const std::string whole = read_bytes(dir / "m.tq");
  std::filesystem::remove(dir / "m.tq");
  {
    Process process(args);
    ASSERT_TRUE(process.wait_for("layer 1/5 done"));
    process.send(SIGINT);
    EXPECT_TRUE(process.wait_for("tq: error: interrupted (tq quantize)"));
    EXPECT_EQ(process.finish(), 130);
  }
  EXPECT_EQ(names_in(dir.path()), (Args{"calib.txt", "m.tq.resume", "model"}));
  args.push_back("--resume");
  {
    Process process(args);
    ASSERT_TRUE(process.wait_for("layer 2/5 done"));
    process.send(SIGKILL);
    EXPECT_EQ(process.finish(), 128 + SIGKILL);
  }
  const CliResult result = run_tq(dir, args);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(names_in(dir.path()), (Args{"calib.txt", "m.tq", "model"}));
  EXPECT_TRUE(read_bytes(dir / "m.tq") == whole);
}

TEST(Signals, CtrlCEndsRunAfterTheCurrentToken) {
  TempDir dir;
  Process process(endless({"run", talkative_model(dir), "Once", "-q"}));
  ASSERT_TRUE(process.wait_for(" "));
  process.send(SIGINT);
  std::string rest;
  EXPECT_EQ(process.finish(&rest), 130);
  EXPECT_EQ(rest, "");  // the text ended with a newline
}

TEST(Signals, AClosedPipeEndsRunQuietly) {
  TempDir dir;
  Process process(endless({"run", talkative_model(dir), "Once", "-q"}));
  ASSERT_TRUE(process.wait_for(" "));
  process.close_output();
  EXPECT_EQ(process.finish(), 128 + SIGPIPE);
}

TEST(Terminal, CtrlCInChatEndsTheAnswerThenTheConversation) {
  TempDir dir;
  Process process(endless({"chat", chat_model(dir), "--template", "chatml-smollm2"}), true);
  ASSERT_TRUE(process.wait_for("> "));
  process.type("Once upon a time\n");
  ASSERT_TRUE(process.wait_for("\n"));  // the echo
  ASSERT_TRUE(process.wait_for(" "));   // the answer has begun
  process.type("\x03");
  ASSERT_TRUE(process.wait_for("\n> "));
  process.type("\x03");
  EXPECT_EQ(process.finish(), 130);
}

// The line mode of a terminal passes on 4,095 bytes of a line.
TEST(Terminal, ALineOfAnyLengthReachesTheModelWhole) {
  TempDir dir;
  const std::string model = chat_model(dir);
  std::string line;
  while (line.size() < 9000) line += "dog ";
  line += "cat";
  const CliResult tokens = run_tq(dir, {"tokenize", model, "--text", line, "--no-special"});
  const auto n = std::count(tokens.out.begin(), tokens.out.end(), '\n');
  ASSERT_GT(n, 2000);
  Process process({"chat", model, "--template", "chatml-smollm2", "--temp", "0", "-n", "1", "-v",
                   "--ctx", "60000"},
                  true);
  ASSERT_TRUE(process.wait_for("> "));
  process.type(line + "\n");
  ASSERT_TRUE(process.wait_for("tq: prompt "));
  std::string count;
  ASSERT_TRUE(process.wait_for(" tokens", &count));
  EXPECT_GE(std::stol(count), n);
  EXPECT_LE(std::stol(count), n + 100);  // the turn markers and the default system text
  process.type("\x04");
  EXPECT_EQ(process.finish(), 0);
}

TEST(Terminal, IsGivenBackAsItWasHoweverChatEnds) {
  TempDir dir;
  const Args chat = {"chat", chat_model(dir), "--template", "chatml-smollm2", "-q"};
  const std::function<void(Process&)> ends[] = {
      [](Process& process) { process.type("\x04"); },  // end of input
      [](Process& process) { process.type("\x03"); },
      [](Process& process) { process.send(SIGTERM); },
      [](Process& process) { process.send(SIGHUP); }};
  for (const auto& end : ends) {
    Process process(chat, true);
    ASSERT_TRUE(process.wait_for("> "));
    EXPECT_FALSE(process.line_mode());
    end(process);
    const bool by_signal = &end != &ends[0];
    EXPECT_EQ(process.wait_exit(), by_signal ? 130 : 0);
    EXPECT_TRUE(process.line_mode());
  }
}

// Latin-1's e acute begins a character of three bytes, so the end of the line is in its place.
TEST(Terminal, ALineThatEndsWithinACharacterIsRefusedAndTheNextOneIsAnswered) {
  TempDir dir;
  Process process(
      {"chat", chat_model(dir), "--template", "chatml-smollm2", "--temp", "0", "-n", "1", "-v"},
      true);
  ASSERT_TRUE(process.wait_for("> "));
  process.type("caf\xE9\n");
  EXPECT_TRUE(process.wait_for("not UTF-8"));
  process.type("one day\n");
  EXPECT_TRUE(process.wait_for("tq: prompt "));
  process.type("\x04");
  EXPECT_EQ(process.finish(), 0);
}

// A pipe does not echo, so what is on stdout is the answers.
TEST(Chat, ATurnThatCannotBeSentIsRefusedAndTheNextOneIsAnswered) {
  TempDir dir;
  const Args chat = {"chat", chat_model(dir), "--template", "chatml-smollm2", "--temp", "0", "-n",
                     "2",    "--ctx",         "120",        "--system",       "Tell."};
  const auto answers = [&](const std::string& turns, const std::string& note) {
    CliOptions options;
    options.stdin_text = turns;
    const CliResult result = run_tq(dir, chat, options);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    EXPECT_NE(result.err.find(note), std::string::npos) << result.err;
    return result.out;
  };
  const std::string expected = answers("a dog\nthe cat\n", "");
  EXPECT_EQ(std::count(expected.begin(), expected.end(), '\n'), 2) << expected;
  EXPECT_EQ(answers("a dog\nhalf \xe8\x83 of it\nthe cat\n", "not UTF-8"), expected);
  EXPECT_EQ(answers("a dog\n" + std::string(2000, 'x') + "\nthe cat\n", "was not sent"), expected);
  EXPECT_EQ(answers("a dog\r\n\r\n\nthe cat\r\n", ""), expected);
  EXPECT_EQ(answers("a dog\nthe cat", ""), expected);  // no newline at the end
}

TEST(Chat, AFullContextForgetsTheOldestTurns) {
  TempDir dir;
  CliOptions options;
  for (int i = 0; i < 8; ++i) options.stdin_text += "Tell me about the little dog and the cat\n";
  const CliResult result = run_tq(dir,
                                  {"chat", chat_model(dir), "--template", "chatml-smollm2",
                                   "--temp", "0", "-n", "4", "--ctx", "120", "--system", "Tell."},
                                  options);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(std::count(result.out.begin(), result.out.end(), '\n'), 8) << result.out;
  EXPECT_NE(result.err.find("turn was forgotten"), std::string::npos) << result.err;
}

// <0x1B> is a token of this vocabulary: raw to a pipe, visible on a terminal.
TEST(Terminal, TextOfAModelCannotSteerIt) {
  TempDir dir;
  const std::string model = copy_model(dir);
  const CliResult ids =
      run_tq(dir, {"tokenize", model, "--text", "\x1b[31mred", "--no-special", "--json"});
  std::string list = Json::parse(ids.out)["ids"].dump();
  list = list.substr(1, list.size() - 2);
  EXPECT_EQ(run_tq(dir, {"tokenize", model, "--decode", list}).out, "\x1b[31mred");
  Process process({"tokenize", model, "--decode", list}, true);
  std::string shown;
  EXPECT_TRUE(process.wait_for("red", &shown));
  EXPECT_EQ(shown, "\\x1B[31m");
}

TEST(Terminal, NamesOfFilesCannotSteerIt) {
  TempDir dir;
  const std::string model = copy_model(dir), output = dir / "\x1b[31m\xc2\x9b.tq";
  const CliResult plan =
      run_tq(dir, {"quantize", model, "-o", output, "--method", "rtn", "--dry-run"});
  EXPECT_EQ(plan.exit_code, 0);
  const CliResult made = run_tq(dir, {"quantize", model, "-o", output, "--method", "rtn"});
  EXPECT_EQ(made.exit_code, 0);
  const CliResult shown = run_tq(dir, {"inspect", output});
  const CliResult run = run_tq(dir, {"run", output, "Once", "-n", "1", "-v"});
  const CliResult checked = run_tq(dir, {"verify", output});
  for (const CliResult* result : {&plan, &made, &shown, &run, &checked}) {
    EXPECT_NE((result->out + result->err).find("\\x1B[31m\\xC2\\x9B"), std::string::npos);
    for (const std::string* text : {&result->out, &result->err}) {
      EXPECT_EQ(text->find_first_of("\x1b\x9b"), std::string::npos) << *text;
    }
  }
}

TEST(Tokenize, AMegabyteOfOneLetterTakesLessThanASecond) {
  TempDir dir;
  write_bytes(dir / "a.txt", std::string(1 << 20, 'a'));
  const CliResult result =
      run_tq(dir, {"tokenize", copy_model(dir), "--file", dir / "a.txt", "--json"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
#if !defined(__SANITIZE_ADDRESS__)
  EXPECT_LT(result.cpu_seconds, 1.0);
#endif
  const Json ids = Json::parse(result.out)["ids"];
  EXPECT_GT(ids.size(), 1000u);
}

TEST(Tokenize, DecodeGivesTheTextBack) {
  TempDir dir;
  const std::string model = copy_model(dir);
  const std::string text = "Once upon a time, there was a \xc3\xa9t\xc3\xa9.";
  const CliResult ids = run_tq(dir, {"tokenize", model, "--text", text, "--json", "--no-special"});
  std::string list = Json::parse(ids.out)["ids"].dump();
  list = list.substr(1, list.size() - 2);
  EXPECT_EQ(run_tq(dir, {"tokenize", model, "--decode", list}).out, text);
}

TEST(Inspect, ShowsTheDistortionOfEveryLinear) {
  TempDir dir;
  const std::string model = copy_model(dir);
  ASSERT_EQ(run_tq(dir, {"quantize", model, "-o", dir / "m.tq", "--method", "rtn", "--report",
                         dir / "r.json", "-q"})
                .exit_code,
            0);
  const Json report = Json::parse(read_bytes(dir / "r.json"))["linears"];
  const Json json = Json::parse(run_tq(dir, {"inspect", dir / "m.tq", "--json"}).out);
  ASSERT_EQ(json["tensors"].size(), report.size() + 1);  // the embedding, which is also the head
  for (size_t i = 0; i < report.size(); ++i) {
    const Json& tensor = json["tensors"][i + 1];
    EXPECT_EQ(tensor["name"], report[i]["name"]);
    const Json &shown = tensor.at("distortion").at("weight_snr_db"),
               &db = report[i]["weight_snr_db"];
    EXPECT_NEAR(shown.get<double>(), db.get<double>(), 0.00051);  // three decimals
  }
}

TEST(Inspect, CallsACopyExact) {
  TempDir dir;
  const std::string model = std::string(TQ_FIXTURES) + "/random-models/llama-tied-bf16-sharded";
  ASSERT_EQ(run_tq(dir, {"quantize", model, "-o", dir / "m.tq", "--method", "none"}).exit_code, 0);
  const Json json = Json::parse(run_tq(dir, {"inspect", dir / "m.tq", "--json"}).out);
  EXPECT_TRUE(json["tensors"][1]["distortion"]["weight_snr_db"].is_null());
  EXPECT_NE(run_tq(dir, {"inspect", dir / "m.tq"}).out.find(" exact\n"), std::string::npos);
}

TEST(Help, NamesTheCommandOnce) {
  TempDir dir;
  const CliResult help = run_tq(dir, {"help", "run"});
  EXPECT_NE(help.out.find("Usage: tq run [OPTIONS]"), std::string::npos) << help.out;
  EXPECT_EQ(run_tq(dir, {"run", "--help"}).out, help.out);
}

// Options of a command as its help lists them.
std::vector<std::string> long_options(const std::string& help) {
  std::vector<std::string> options;
  for (size_t at = help.find("\nOptions:"); (at = help.find("\n  -", at)) != std::string::npos;
       ++at) {
    const size_t begin = help.find("--", at);
    options.push_back(help.substr(begin, help.find_first_of(" \n,", begin) - begin));
  }
  return options;
}

TEST(Help, ManPageAndCompletionListWhatHelpLists) {
  TempDir dir;
  const std::string man = run_tq(dir, {"help", "--man"}).out;
  write_bytes(dir / "tq.bash", run_tq(dir, {"completion"}).out);
  const auto completions = [&](const std::string& words, int index) {
    const std::string script = "source " + dir.path() + "/tq.bash; COMP_WORDS=(" + words +
                               "); COMP_CWORD=" + std::to_string(index) +
                               "; _tq; printf '%s ' \"${COMPREPLY[@]}\" > " + dir.path() + "/words";
    write_bytes(dir / "script", script);
    EXPECT_EQ(std::system(("bash " + (dir / "script")).c_str()), 0);
    return " " + read_bytes(dir / "words");
  };
  for (const char* command : {"quantize", "run", "chat", "eval", "logits", "tokenize", "inspect",
                              "verify", "bench", "help", "completion"}) {
    EXPECT_NE(completions("tq \"\"", 1).find(std::string(" ") + command + " "), std::string::npos);
    EXPECT_NE(man.find(std::string(".SS tq ") + command + "\n"), std::string::npos);
    const auto options = long_options(run_tq(dir, {"help", command}).out);
    EXPECT_GE(options.size(), 1u) << command;
    const std::string offered = completions(std::string("tq ") + command + " --", 2);
    for (std::string option : options) {
      EXPECT_NE(offered.find(" " + option + " "), std::string::npos) << command << " " << option;
      for (size_t at = 0; (at = option.find('-', at)) != std::string::npos; at += 2) {
        option.insert(at, "\\");
      }
      EXPECT_NE(man.find(option), std::string::npos) << command << " " << option;
    }
  }
  EXPECT_EQ(completions("tq run m", 2), "  ");  // nothing: bash offers files
}

}  // namespace
}  // namespace tq
