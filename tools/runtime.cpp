// runtime - see runtime.h.
#include "tools/runtime.h"

#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>
#include <vector>

#ifdef TQ_WITH_CUDA
#include "cuda/cuda_backend.h"
#endif
#include "model/error.h"
#include "tools/turn_reader.h"

namespace tq {
namespace {

// A prompt or an evaluation text beyond this is refused rather than read into memory.
constexpr size_t kMaxTextBytes = size_t{1} << 31;

// Stdin has no size to look at first, and may never end.
constexpr size_t kMaxStdinBytes = size_t{256} << 20;

bool is_separator(char c) {
  return c == ',' || c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

}  // namespace

void add_device_options(CLI::App& command, DeviceOptions& options, bool with_kv) {
  command.add_option("--device", options.device, "auto, cpu or cuda")->capture_default_str();
  command.add_option("--threads", options.threads, "CPU threads; 0 = all cores")
      ->check(number_in(0, 1024))
      ->capture_default_str();
  if (with_kv) {
    command.add_option("--kv-bits", options.kv_bits, "bits per cached key or value")
        ->check(CLI::IsMember({32, 16, 8, 4}))
        ->default_str("32 for an unquantized folder, else the file's, mostly 16");
  }
  command.add_flag_callback(
      "--no-verify", [&options] { options.verify = Verify::kTexts; },
      "load a .tq file without checking the checksums of its weights");
}

std::unique_ptr<Backend> open_backend(const DeviceOptions& options) {
  if (options.device != "auto" && options.device != "cpu" && options.device != "cuda") {
    throw Error(ErrorKind::kUsage, "unknown device", "--device " + options.device,
                "expected auto, cpu or cuda");
  }
#ifdef TQ_WITH_CUDA
  std::string why;
  if (options.device == "cuda" || (options.device == "auto" && cuda_usable(why))) {
    return make_cuda_backend();
  }
#else
  if (options.device == "cuda") {
    throw Error(ErrorKind::kResource, "no CUDA device", "--device cuda",
                "this tq was built without CUDA", "use --device cpu");
  }
#endif
  return std::make_unique<CpuBackend>(options.threads);
}

Tokenizer open_tokenizer(const Model& model) {
  Tokenizer tokenizer = Tokenizer::from_texts(model.texts, model.source);
  if (tokenizer.size() > model.config.vocab_size) {
    const auto last = static_cast<int32_t>(tokenizer.size() - 1);
    throw Error(ErrorKind::kBadData, "tokenizer does not fit the model",
                model.source + ": tokenizer.json and tokenizer_config.json",
                "ids up to " + std::to_string(last) + " ('" + tokenizer.piece(last) +
                    "'), the embedding has " + std::to_string(model.config.vocab_size) + " rows");
  }
  return tokenizer;
}

void print_notes(const Model& model, const Tokenizer& tokenizer) {
  for (const std::string& sentence : model.notes) note(model.source + ": " + sentence);
  for (const auto* notes : {&model.config.notes, &tokenizer.notes()}) {
    for (const std::string& sentence : *notes) note(sentence);
  }
}

Runtime::Runtime(const std::string& path, const DeviceOptions& options)
    : model(load_model(path, options.verify)),
      tokenizer(open_tokenizer(model)),
      backend(open_backend(options)),
      prepared(model, *backend) {}

bool Runtime::quantized() const {
  return model.quantization.value("method", "none") != "none";
}

int64_t Runtime::default_ctx(int64_t wanted) const {
  return std::min(wanted, model.config.max_seq_len);
}

int64_t checked_ctx(const Model& model, int64_t ctx) {
  if (ctx > model.config.max_seq_len) {
    throw Error(
        ErrorKind::kUsage, "context too long", std::to_string(ctx) + " tokens",
        "the model was trained for " + std::to_string(model.config.max_seq_len) + " positions");
  }
  return ctx;
}

SessionOptions default_session(const Model& model, const Backend& backend) {
  SessionOptions options;
  const bool quantized = model.quantization.value("method", "none") != "none";
  options.kv_bits = quantized || model.kv_bits < 16 ? model.kv_bits : 32;
  options.chunk = backend.step_rows();
  options.stop = check_interrupted;
  return options;
}

int64_t Runtime::checked_ctx(int64_t ctx) const {
  return tq::checked_ctx(model, ctx);
}

SessionOptions Runtime::session_options(int64_t ctx, int kv_bits) const {
  SessionOptions options = default_session(model, *backend);
  options.ctx = ctx;
  if (kv_bits) options.kv_bits = kv_bits;
  options.valid_vocab = tokenizer.size();
  return options;
}

CLI::Validator not_empty() {
  return CLI::Validator(
      [](std::string& value) { return std::string(value.empty() ? "is empty" : ""); }, "");
}

CLI::Validator number_in(double low, double high) {
  const auto text = [](double value) {
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%.10g", value);
    return std::string(buffer);
  };
  const std::string range = "[" + text(low) + ", " + text(high) + "]";
  return CLI::Validator(
      [low, high, range](std::string& value) {
        double number = 0;
        const char* end = value.data() + value.size();
        // from_chars: the whole value, no hexadecimal, no blanks, whatever the locale.
        const auto [rest, error] = std::from_chars(value.data(), end, number);
        if (error != std::errc() || rest != end || !std::isfinite(number) || number < low ||
            number > high) {
          return "\"" + value + "\" is not a number in " + range;
        }
        return std::string();
      },
      "in " + range);
}

void write_stdout(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw Error(ErrorKind::kIo, "cannot write output", "stdout", std::strerror(errno));
  }
}

void write_text(std::string_view text) {
  static const bool terminal = ::isatty(STDOUT_FILENO) == 1;
  write_stdout(terminal ? printable_text(std::string(text)) : text);
}

void write_json(const Json& json, int indent) {
  const bool terminal = ::isatty(STDOUT_FILENO) == 1;
  write_result(json.dump(indent, ' ', terminal, Json::error_handler_t::replace) + "\n");
}

void note(const std::string& sentence) {
  std::fprintf(stderr, "tq: %s\n", printable(sentence).c_str());
}

void write_result(std::string_view text) {
  write_stdout(text);
  result_is_out();
}

uint64_t peak_rss_bytes() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
}

std::vector<std::string> model_files(const std::string& model) {
  std::vector<std::string> files = {model};
  std::error_code ignored;  // not a folder, or none at all: opening the model says so
  for (const auto& entry : std::filesystem::directory_iterator(model, ignored)) {
    files.push_back(entry.path().string());
  }
  return files;
}

std::vector<int32_t> parse_ids(const std::string& option, const std::string& list, int64_t n_ids) {
  std::vector<int32_t> ids;
  const char *cursor = list.data(), *const end = cursor + list.size();
  // Passes blanks and at most one comma; whether there was a comma.
  const auto separator = [&] {
    bool comma = false;
    for (; cursor < end && is_separator(*cursor); ++cursor) {
      if (*cursor == ',' && std::exchange(comma, true)) break;  // a missing id between two
    }
    return comma;
  };
  bool comma = separator();  // a comma in front or at the end has a missing id beside it
  while (cursor < end || comma) {
    int32_t id = -1;
    const auto [next, error] = std::from_chars(cursor, end, id);
    const bool ends = next == end || is_separator(*next);
    if ((comma && ids.empty()) || error != std::errc() || !ends || id < 0 || id >= n_ids) {
      throw Error(ErrorKind::kUsage, "bad token id", option,
                  "expected ids in 0.." + std::to_string(n_ids - 1) +
                      " separated by commas or spaces, for example 1,2,3");
    }
    ids.push_back(id);
    cursor = next;
    comma = separator();
  }
  if (ids.empty()) throw Error(ErrorKind::kUsage, "no token ids", option, "the list is empty");
  return ids;
}

std::string read_input_text(const std::string& path) {
  if (path != "-") return read_text_file(path, kMaxTextBytes, Accept::kPipesToo);
  const EndsAtOnce waiting;
  std::string text;
  std::vector<char> block(size_t{1} << 16);
  while (const size_t n = std::fread(block.data(), 1, block.size(), stdin)) {
    if (n > kMaxStdinBytes - text.size()) {
      throw Error(ErrorKind::kBadData, "text too long", "stdin",
                  "more than " + std::to_string(kMaxStdinBytes) + " bytes", "use a file");
    }
    text.append(block.data(), n);
  }
  if (std::ferror(stdin)) throw Error(ErrorKind::kIo, "cannot read", "stdin", std::strerror(errno));
  return text;
}

}  // namespace tq
