// tq - the command line. Parses, dispatches to cmd_<name>.cpp, and turns every failure into one
// line on stderr and an exit code (model/error.h). Nothing else is printed here.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "model/error.h"
#include "tools/commands.h"
#include "tools/runtime.h"
#include "tools/safety_net.h"

#ifndef TQ_VERSION
#define TQ_VERSION "0.1.0"
#endif

namespace tq {
namespace {

// Levenshtein distance, for "did you mean".
size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substitute = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substitute});
    }
  }
  return row.back();
}

std::string nearest(const std::string& word, const std::vector<std::string>& known) {
  std::string best;
  size_t best_distance = 3;  // more than two typing errors is another word
  for (const std::string& candidate : known) {
    const size_t distance = edit_distance(word, candidate);
    if (distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

CLI::App* chosen_command(CLI::App& app) {
  const auto commands = app.get_subcommands();
  return commands.empty() ? nullptr : commands.front();
}

constexpr const char* kNoMemory =
    "out of memory (host): an allocation failed; lower --ctx or free memory";

int fail(ErrorKind kind, const char* message) {
  ignore_signals();
  std::fprintf(stderr, "tq: error: %s\n", message);
  return static_cast<int>(kind);
}

int usage_error(CLI::App& app, const CLI::ParseError& error) {
  CLI::App* command = chosen_command(app);
  std::string why = error.what();
  std::string hint = command ? "see tq " + command->get_name() + " --help" : "see tq --help";
  const std::vector<std::string> extras = command ? command->remaining() : app.remaining();
  const std::string word = extras.empty() ? "" : extras.front();
  const bool is_option = word.size() > 1 && word[0] == '-';
  // CLI11 reports a missing argument first, even where a misspelt option is the mistake.
  if (is_option || dynamic_cast<const CLI::ExtrasError*>(&error)) {
    std::vector<std::string> known;
    if (is_option) {
      for (const CLI::Option* option : (command ? *command : app).get_options()) {
        for (const std::string& name : option->get_lnames()) known.push_back("--" + name);
      }
    } else if (!command) {
      for (const CLI::App* sub : app.get_subcommands({})) known.push_back(sub->get_name());
    }
    why = std::string(is_option ? "unknown option "
                      : command ? "unexpected argument "
                                : "unknown command ") +
          word;
    const std::string close = nearest(word, known);
    if (!close.empty()) hint = "did you mean " + close + "? " + hint;
  }
  const std::string where = command ? "tq " + command->get_name() : "tq";
  const Error line(ErrorKind::kUsage, "usage", where, why, hint);
  return fail(line.kind(), line.what());
}

int run(int argc, char** argv) {
  CLI::App app(
      "tq: quantize Llama-3 and Qwen3 models to 4 bits and run them\n\n"
      "  tq quantize HF_DIR -o model.tq\n"
      "  tq run model.tq \"Why is the sky blue?\"");
  app.name("tq");
  app.set_version_flag("--version", std::string("tq ") + TQ_VERSION);
  app.require_subcommand(0, 1);
  add_quantize_command(app);
  add_run_command(app);
  add_chat_command(app);
  add_eval_command(app);
  add_logits_command(app);
  add_tokenize_command(app);
  add_inspect_command(app);
  add_verify_command(app);
  add_bench_command(app);
  add_help_command(app);
  add_completion_command(app);

  try {
    app.parse(argc, argv);
    if (!chosen_command(app)) {
      throw Error(ErrorKind::kUsage, "no command", "tq", "nothing to do", "see tq --help");
    }
    return 0;
  } catch (const CLI::CallForVersion& version) {
    write_result(std::string(version.what()) + "\n");
    return 0;
  } catch (const CLI::CallForHelp&) {
    CLI::App* command = chosen_command(app);
    write_result(command ? command->help("tq") : app.help());
    return 0;
  } catch (const CLI::ParseError& error) {
    return usage_error(app, error);
  }
}

}  // namespace
}  // namespace tq

int main(int argc, char** argv) {
  tq::hold_standard_descriptors();
  tq::install_fatal_handlers();
  tq::install_signal_handler();
  try {
    return tq::run(argc, argv);
  } catch (const tq::Error& error) {
    return tq::fail(error.kind(), error.what());
  } catch (const std::bad_alloc&) {
    return tq::fail(tq::ErrorKind::kResource, tq::kNoMemory);
  } catch (const std::length_error&) {  // a size beyond what any memory holds
    return tq::fail(tq::ErrorKind::kResource, tq::kNoMemory);
  } catch (const std::filesystem::filesystem_error& error) {
    const tq::Error line(tq::ErrorKind::kIo, "cannot examine path", error.path1().string(),
                         error.code().message());
    return tq::fail(line.kind(), line.what());
  } catch (const std::exception& error) {
    const tq::Error line(tq::ErrorKind::kInternal, "internal error", "tq", error.what(),
                         "please report it");
    return tq::fail(line.kind(), line.what());
  }
}
