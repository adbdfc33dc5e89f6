// cmd_logits - `tq logits`: all logits of a sequence as a NumPy file, to compare with any
// reference.
#include "model/atomic_file.h"
#include "model/error.h"
#include "quant/preflight.h"
#include "tools/commands.h"
#include "tools/runtime.h"

namespace tq {
namespace {

struct LogitsOptions {
  std::string model, ids, text, output;
  DeviceOptions device;
};

// Header of a .npy file, version 1.0: little-endian float32, C order, padded to 64 bytes.
std::string npy_header(int64_t rows, int64_t cols) {
  std::string dict = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(rows) +
                     ", " + std::to_string(cols) + "), }";
  dict.append(63 - (10 + dict.size()) % 64, ' ');
  dict += '\n';
  std::string header("\x93NUMPY\x01\x00", 8);
  header += static_cast<char>(dict.size() & 255);
  header += static_cast<char>(dict.size() >> 8);
  return header + dict;
}

void logits(const LogitsOptions& options) {
  if (options.ids.empty() == options.text.empty()) {
    throw Error(ErrorKind::kUsage, "which tokens?", "tq logits", "give --ids or --text, not both");
  }
  check_output_path(options.output, model_files(options.model), true);
  Runtime runtime(options.model, options.device);
  print_notes(runtime.model, runtime.tokenizer);
  const std::vector<int32_t> ids =
      options.ids.empty() ? runtime.tokenizer.encode(options.text, true, true)
                          : parse_ids("--ids", options.ids, runtime.model.config.vocab_size);
  const int64_t count = static_cast<int64_t>(ids.size());
  runtime.checked_ctx(count);
  Session session(runtime.prepared, runtime.session_options(count, options.device.kv_bits));
  AtomicFile file(options.output);
  const std::string header = npy_header(count, runtime.model.config.vocab_size);
  file.write(header.data(), header.size());
  session.feed_all(ids, [&](int64_t, int64_t, std::span<const float> block) {
    check_interrupted();
    file.write(block.data(), block.size_bytes());
  });
  file.finish();
}

}  // namespace

void add_logits_command(CLI::App& app) {
  auto options = std::make_shared<LogitsOptions>();
  CLI::App* command =
      app.add_subcommand("logits", "logits of a sequence as float32 .npy [n_tokens, vocab_size]");
  command->add_option("model", options->model, ".tq file or Hugging Face folder")->required();
  command->add_option("--ids", options->ids, "token ids, for example 1,2,3");
  command->add_option("--text", options->text, "text to tokenise");
  command->add_option("-o,--output", options->output, "the .npy file")->required();
  add_device_options(*command, options->device, true);
  command->callback([options] { logits(*options); });
}

}  // namespace tq
