// commands - one function per `tq` command; each adds its subcommand to the command line.
//
// A command's callback throws tq::Error on failure; tq.cpp turns that into one line and an exit
// code. Read next: cmd_run.cpp.
#pragma once

#include <CLI/CLI.hpp>

namespace tq {

void add_quantize_command(CLI::App& app);
void add_run_command(CLI::App& app);
void add_chat_command(CLI::App& app);
void add_eval_command(CLI::App& app);
void add_logits_command(CLI::App& app);
void add_tokenize_command(CLI::App& app);
void add_inspect_command(CLI::App& app);
void add_verify_command(CLI::App& app);
void add_bench_command(CLI::App& app);
void add_help_command(CLI::App& app);
void add_completion_command(CLI::App& app);

}  // namespace tq
