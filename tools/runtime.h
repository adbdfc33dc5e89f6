// runtime - what the commands share: opening a model on a device, checked output, signals.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <string_view>

#include "cpu/cpu_backend.h"
#include "model/forward.h"
#include "tokenizer/tokenizer.h"
#include "tools/last_resort.h"

namespace tq {

/// Options that choose the device; add_device_options() puts them on a command.
struct DeviceOptions {
  std::string device = "auto";
  int threads = 0;  // 0 = all cores
  int kv_bits = 0;  // 0 = what the model asks for
  Verify verify = Verify::kAll;
};
void add_device_options(CLI::App& command, DeviceOptions& options, bool with_kv);

/// A model ready to run. Not movable: the parts refer to each other.
struct Runtime {
  Runtime(const std::string& path, const DeviceOptions& options);
  Runtime(const Runtime&) = delete;
  Model model;
  Tokenizer tokenizer;
  std::unique_ptr<Backend> backend;
  PreparedModel prepared;

  bool quantized() const;
  /// Longest timeline offered by default: the model's own limit, at most `wanted` tokens.
  int64_t default_ctx(int64_t wanted) const;
  /// Checks a user's --ctx against the model. Throws kUsage.
  int64_t checked_ctx(int64_t ctx) const;
  SessionOptions session_options(int64_t ctx, int kv_bits) const;
};

/// Checks a user's --ctx against the model. Throws kUsage.
int64_t checked_ctx(const Model& model, int64_t ctx);
/// KV width and prefill step that a model and a device ask for; ctx and valid_vocab are the
/// caller's.
SessionOptions default_session(const Model& model, const Backend& backend);

/// The tokenizer of a model; checks that its ids fit the embedding. Throws kBadData.
Tokenizer open_tokenizer(const Model& model);
/// Prints what a user should know about the files and texts of a model, a line each on stderr.
void print_notes(const Model& model, const Tokenizer& tokenizer);
std::unique_ptr<Backend> open_backend(const DeviceOptions& options);

/// CLI11 validator: a text that is not empty, as an unset shell variable would be.
CLI::Validator not_empty();
/// CLI11 validator: a finite number in [low, high]; `name` describes the range in messages.
CLI::Validator number_in(double low, double high);

/// Writes to stdout at once. Throws kIo when that fails (disk full, closed); a closed pipe ends the
/// process by SIGPIPE as usual.
void write_stdout(std::string_view text);
/// The same for text of a model or a file: raw to files and pipes, and without control sequences to
/// a terminal (printable_text()).
void write_text(std::string_view text);
/// One JSON value and a newline; bytes that are not UTF-8 become U+FFFD. To a terminal in ASCII.
void write_json(const Json& json, int indent = -1);
/// One line for the user on stderr, `tq: SENTENCE`, with control characters escaped.
void note(const std::string& sentence);

/// The same, where it is the last of what a command has to say: what fails after it, while things
/// are put away, is no failure of the command.
void write_result(std::string_view text);

/// Largest resident memory of this process so far, bytes.
uint64_t peak_rss_bytes();

/// The files of a model folder, or the .tq file itself: what an output must not replace.
std::vector<std::string> model_files(const std::string& model);

/// Token ids 0 .. n_ids - 1, separated by commas or blanks. Throws kUsage naming `option`.
std::vector<int32_t> parse_ids(const std::string& option, const std::string& list, int64_t n_ids);

/// Reads a whole text file or pipe, or stdin for "-", of which more than 256 MiB throw kBadData.
std::string read_input_text(const std::string& path);

}  // namespace tq
