// cmd_help - `tq help` and `tq completion`: help, man page and shell completion.
//
// All three are made from the description of the command line that also parses it, so that they
// list the same options.
#include "model/error.h"
#include "tools/commands.h"
#include "tools/runtime.h"

namespace tq {
namespace {

// Of all commands, parsed or not.
const std::function<bool(const CLI::App*)> kAll;

// Text of a man page: a hyphen of an option is a minus, a backslash itself.
std::string roff(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '-' || c == '\\') out += '\\';
    out += c == '\\' ? 'e' : c;
  }
  return out.starts_with('.') || out.starts_with('\'') ? "\\&" + out : out;
}

std::string man_page(const CLI::App& app) {
  std::string page =
      ".TH TQ 1\n.SH NAME\ntq \\- quantize language models to 4 bits and run them\n"
      ".SH SYNOPSIS\n.B tq\n.I COMMAND\n[\\fIOPTIONS\\fR]\n.SH COMMANDS\n";
  for (const CLI::App* command : app.get_subcommands(kAll)) {
    page += ".SS tq " + roff(command->get_name()) + "\n" + roff(command->get_description()) + "\n";
    for (const CLI::Option* option : command->get_options()) {
      page += ".TP\n\\fB" + roff(option->get_name(option->get_positional(), true)) + "\\fR\n" +
              roff(option->get_description());
      if (!option->get_default_str().empty()) {
        page += " (default: " + roff(option->get_default_str()) + ")";
      }
      page += "\n";
    }
  }
  return page +
         ".SH EXIT STATUS\n0 ok, 1 internal error, 2 usage, 3 bad data, 4 memory or device, "
         "5 input or output, 130 interrupted\n";
}

// Names of commands, options behind a dash, else what the shell does by default: files.
std::string bash_completion(const CLI::App& app) {
  std::string commands, cases;
  for (const CLI::App* command : app.get_subcommands(kAll)) {
    commands += (commands.empty() ? "" : " ") + command->get_name();
    cases += "    " + command->get_name() + ") words='";
    for (const CLI::Option* option : command->get_options()) {
      for (const std::string& name : option->get_lnames()) cases += " --" + name;
    }
    cases += "' ;;\n";
  }
  return "# bash completion of tq: source <(tq completion)\n_tq() {\n"
         "  local current=${COMP_WORDS[COMP_CWORD]} words=''\n  case ${COMP_WORDS[1]} in\n" +
         cases + "  esac\n  if [[ $COMP_CWORD -eq 1 ]]; then words='" + commands +
         "'; elif [[ $current != -* ]]; then words=''; fi\n"
         "  COMPREPLY=($(compgen -W \"$words\" -- \"$current\"))\n}\n"
         "complete -o default -F _tq tq\n";
}

}  // namespace

void add_help_command(CLI::App& app) {
  struct Options {
    std::string topic;
    bool man = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("help", "help for a command");
  command->add_option("command", options->topic, "name of the command");
  command->add_flag("--man", options->man, "all commands as a man page");
  command->callback([&app = std::as_const(app), options] {
    const CLI::App* topic = nullptr;
    for (const CLI::App* known : app.get_subcommands(kAll)) {
      if (known->get_name() == options->topic) topic = known;
    }
    if (!options->topic.empty() && !topic) {
      throw Error(ErrorKind::kUsage, "unknown command", "tq help", options->topic, "see tq --help");
    }
    write_result(options->man ? man_page(app) : topic ? topic->help("tq") : app.help());
  });
}

void add_completion_command(CLI::App& app) {
  app.add_subcommand("completion", "the completion script for bash: source <(tq completion)")
      ->callback([&app] { write_result(bash_completion(app)); });
}

}  // namespace tq
