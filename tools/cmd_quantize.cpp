// cmd_quantize - `tq quantize`: a Hugging Face folder to one .tq file.
//
// This file is the command line, the checks before work, progress and the report; the work is
// quant/pipeline.h. Everything that can be refused is refused before anything is computed.
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <string_view>

#include "model/atomic_file.h"
#include "model/error.h"
#include "model/tq_file.h"
#include "quant/pipeline.h"
#include "quant/preflight.h"
#include "quant/resume.h"
#include "tokenizer/chat.h"
#include "tools/calibration_text.h"
#include "tools/commands.h"
#include "tools/generate.h"
#include "tools/runtime.h"
#include "tools/trial.h"

namespace tq {
namespace {

using Clock = std::chrono::steady_clock;

// Options as typed; absent ones keep the method's default.
struct QuantizeArguments {
  std::string folder, output, method = "twinquant", report, calib, device = "cpu";
  std::optional<std::string> rounding, basis, split, basis_rank, loss, act_codes, group_a;
  std::optional<int64_t> rank, steps, refine_steps;
  std::optional<int> branch_bits, bits_w, bits_a, embed_bits, head_bits, kv_bits;
  std::optional<int64_t> group, calib_samples, calib_length;
  std::vector<std::string> keep;
  uint64_t seed = 0;
  int threads = 0;
  bool act_order = false, two_level = false, dry_run = false, resume = false, force = false,
       quiet = false;
};

template <typename T, typename U>
void override_with(T& target, const std::optional<U>& value) {
  if (value) target = *value;
}

template <typename T>
struct Named {
  const char* name;
  T value;
};
constexpr Named<RoundingKind> kRoundings[] = {{"rtn", RoundingKind::kNearest},
                                              {"gptq", RoundingKind::kGptq},
                                              {"gptq-ls", RoundingKind::kGptqCorrected}};
constexpr Named<LearningLoss> kLosses[] = {{"layer", LearningLoss::kLayer},
                                           {"block", LearningLoss::kBlock},
                                           {"kl", LearningLoss::kKl},
                                           {"ce", LearningLoss::kCrossEntropy}};
constexpr Named<ActCodes> kActCodes[] = {{"symmetric", ActCodes::kSymmetric},
                                         {"all", ActCodes::kAll},
                                         {"asymmetric", ActCodes::kAsymmetric}};
constexpr Named<Basis> kBases[] = {{"none", Basis::kNone},
                                   {"hadamard", Basis::kHadamard},
                                   {"learned", Basis::kLearned},
                                   {"layerwise", Basis::kLayerwise}};

template <typename T, size_t N>
std::set<std::string> names_of(const Named<T> (&list)[N]) {
  std::set<std::string> names;
  for (const Named<T>& item : list) names.insert(item.name);
  return names;
}
template <typename T, size_t N>
T find_name(const Named<T> (&list)[N], const std::string& name) {
  for (const Named<T>& item : list) {
    if (name == item.name) return item.value;
  }
  throw Error(ErrorKind::kInternal, "unknown name", name, "it passed the check of the options");
}

// --steps, --loss, --refine-steps and --basis-rank, which only some bases and roundings have.
void override_learning(QuantizeOptions& options, const QuantizeArguments& args,
                       const Config& config) {
  const auto refuse = [](const std::string& why, const std::string& hint) {
    throw Error(ErrorKind::kUsage, "usage", "tq quantize", why, hint);
  };
  if (options.learns_basis() && options.steps == 0) options.steps = kLearningSteps;
  if (args.steps && !options.learns_basis()) {
    refuse("--steps without a learned basis", "give --basis learned or layerwise");
  }
  if (args.loss && !options.learns_basis()) {
    refuse("--loss without a learned basis", "give --basis learned or layerwise");
  }
  if (args.loss) options.loss = find_name(kLosses, *args.loss);
  override_with(options.steps, args.steps);
  override_with(options.refine_steps, args.refine_steps);
  if (!args.basis_rank) {
    options.basis_rank = std::min(options.basis_rank, config.dim);
    return;
  }
  if (options.basis != Basis::kLayerwise) {
    refuse("--basis-rank without a basis for every sublayer",
           "give --method respinquant or --basis layerwise");
  }
  if (*args.basis_rank == "full") {
    options.basis_rank = config.dim;
    return;
  }
  const char* end = args.basis_rank->data() + args.basis_rank->size();
  const auto [stop, error] = std::from_chars(args.basis_rank->data(), end, options.basis_rank);
  if (error != std::errc() || stop != end || options.basis_rank < 0) {
    refuse("--basis-rank " + *args.basis_rank + " is neither a rank nor full", "");
  }
}

QuantizeOptions make_options(const QuantizeArguments& args, const Config& config) {
  QuantizeOptions options = method_preset(args.method);
  const auto contradiction = [&](const std::string& option) {
    throw Error(ErrorKind::kUsage, "usage", "tq quantize",
                option + " contradicts --method " + args.method);
  };
  if (args.method == "none" && (args.rounding || args.bits_w.value_or(16) < 16)) {
    contradiction(args.rounding ? "--rounding" : "--bits-w " + std::to_string(*args.bits_w));
  }
  if (args.rounding) options.rounding = find_name(kRoundings, *args.rounding);
  options.act_order = args.act_order;
  if (args.basis) options.basis = find_name(kBases, *args.basis);
  override_with(options.bits_w, args.bits_w);
  if (options.bits_w >= 16 && options.rounding != RoundingKind::kStore) {
    if (args.rounding) contradiction("--rounding with --bits-w " + std::to_string(options.bits_w));
    options.rounding = RoundingKind::kStore;
    options.bits_a = 16;
    if (!args.rank) options.rank = 0;
    if (!args.refine_steps) options.refine_steps = 0;
  }
  override_with(options.bits_a, args.bits_a);
  // A preset's rank is what most models bear, not a demand.
  options.rank =
      std::min({options.rank, config.dim, config.hidden_dim, config.q_dim(), config.kv_dim()});
  override_with(options.rank, args.rank);
  if (args.split) options.split = *args.split == "fit" ? Split::kFit : Split::kSvd;
  override_with(options.branch_bits, args.branch_bits);
  if ((args.branch_bits || args.split) && options.rank == 0) {
    throw Error(ErrorKind::kUsage, "usage", "tq quantize",
                std::string(args.split ? "--split" : "--branch-bits") + " without a branch",
                "give --rank, or --method svdquant");
  }
  if (args.basis && args.method == "none" && options.basis != Basis::kNone)
    contradiction("--basis");
  override_learning(options, args, config);
  override_with(options.group, args.group);
  options.group_a = !args.group_a              ? options.group
                    : *args.group_a == "token" ? kTokenGroups
                                               : std::stoll(*args.group_a);
  options.two_level = args.two_level;
  if (args.act_codes) options.act_codes = find_name(kActCodes, *args.act_codes);
  // The basis alone is to be tested then, so nothing else may be rounded.
  if (options.bits_w == 32) options.embed_bits = options.head_bits = 32;
  // A tied model stores one table: naming one of the two options decides both.
  if (config.tied && args.embed_bits && !args.head_bits) options.head_bits = *args.embed_bits;
  if (config.tied && args.head_bits && !args.embed_bits) options.embed_bits = *args.head_bits;
  override_with(options.embed_bits, args.embed_bits);
  override_with(options.head_bits, args.head_bits);
  override_with(options.kv_bits, args.kv_bits);
  override_with(options.calib_samples, args.calib_samples);
  options.calib_length = std::min(options.calib_length, config.max_seq_len);
  override_with(options.calib_length, args.calib_length);
  options.keep = args.keep;
  options.seed = args.seed;
  const long cores = sysconf(_SC_NPROCESSORS_ONLN);
  options.threads = args.threads > 0 ? args.threads : static_cast<int>(std::max(1L, cores));
  check_options(options, config);
  if (!options.needs_calibration() &&
      (!args.calib.empty() || args.calib_samples || args.calib_length || args.device != "cpu")) {
    throw Error(ErrorKind::kUsage, "usage", "tq quantize",
                "calibration options have no effect: this method needs no text");
  }
  return options;
}

Model open_source(const std::string& folder) {
  if (looks_like_tq(folder)) {
    throw Error(ErrorKind::kBadData, "already quantized", folder, "it is a .tq file",
                "give the original Hugging Face folder");
  }
  return load_hf_folder(folder);
}

Calibration make_calibration(const QuantizeArguments& args, const QuantizeOptions& options,
                             const Model& model, const Tokenizer& tokenizer) {
  const std::string where = args.calib.empty() ? "built-in calibration text" : args.calib;
  const std::string text = args.calib.empty()
                               ? std::string(builtin_calibration_text())
                               : calibration_text(read_input_text(args.calib), args.calib);
  if (text.empty()) throw Error(ErrorKind::kBadData, "calibration text is empty", where, "0 bytes");
  if (!is_valid_utf8(text)) {
    throw Error(ErrorKind::kBadData, "calibration text is not UTF-8", where,
                "it holds bytes that are no valid characters",
                "convert it, for example with iconv");
  }
  Calibration calibration = cut_samples(tokenizer.encode(text, false, false), options.calib_samples,
                                        options.calib_length, model.config.vocab_size, where);
  const int64_t n_samples = std::ssize(calibration.samples);
  if (n_samples < options.calib_samples && !args.quiet) {
    note("the calibration text gives " + std::to_string(n_samples) + " samples of " +
         std::to_string(options.calib_length) + " tokens, " +
         std::to_string(options.calib_samples) + " were asked for");
  }
  // Plain text and chats, as `tq eval` and `tq run` will feed them.
  make_every_second_a_conversation(tokenizer, detect_chat_kind(model.texts, args.folder),
                                   calibration.samples);
  return calibration;
}

std::string megabytes(uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MB", static_cast<double>(bytes) / 1e6);
  return text;
}

// One line a layer and one every tenth of a descent, or one redrawn line on a terminal. The time
// left is that of the present stage.
class Progress {
 public:
  explicit Progress(bool quiet) : quiet_(quiet), terminal_(isatty(STDERR_FILENO) == 1) {}
  ~Progress() { clear(); }

  void note(const std::string& sentence) {
    if (quiet_) return;
    clear();
    tq::note(sentence);
  }

  void step(int64_t layer, int64_t n_layers, const char* name) {
    const bool done = *name == '\0';
    if (std::string_view(name) == "sampling") {
      enter("sampling");
      if (terminal_ || layer == 0) draw("sampling", layer, n_layers, "");
      return;
    }
    enter("layers");
    char text[64];
    std::snprintf(text, sizeof text, " %s", done ? "done" : name);
    if (terminal_ || done) draw("layer", layer + done, n_layers, text);
  }

  void descent(const char* stage, int64_t step, int64_t n_steps, double loss) {
    enter(stage);
    char text[64];
    std::snprintf(text, sizeof text, ", loss %.5f", loss);
    const int64_t tenth = std::max<int64_t>(1, n_steps / 10);
    if (terminal_ || step % tenth == 0 || step == n_steps) draw(stage, step, n_steps, text);
  }

 private:
  void enter(const std::string& stage) {
    if (stage == stage_) return;
    stage_ = stage;
    start_ = Clock::now();
  }
  void draw(const char* what, int64_t n_done, int64_t n, const char* text) {
    if (quiet_) return;
    const double elapsed = std::chrono::duration<double>(Clock::now() - start_).count();
    char time_left[32] = "";
    if (n_done > 0) {
      const double left = elapsed / static_cast<double>(n_done) * static_cast<double>(n - n_done);
      std::snprintf(time_left, sizeof time_left, ", %.0f s left", left);
    }
    std::fprintf(stderr, "%stq: %s %lld/%lld%s, %.0f s%s%s", terminal_ ? "\r\x1b[K" : "", what,
                 static_cast<long long>(n_done), static_cast<long long>(n), text, elapsed,
                 time_left, terminal_ ? "" : "\n");
    line_open_ = terminal_;
  }
  void clear() {
    if (line_open_) std::fprintf(stderr, "\r\x1b[K");
    line_open_ = false;
  }
  bool quiet_, terminal_, line_open_ = false;
  std::string stage_;
  Clock::time_point start_ = Clock::now();
};

void print_plan(const QuantizePlan& plan, const QuantizeOptions& options, const Calibration* calib,
                const std::string& output) {
  note("plan for " + output + ": " + describe_options(options).dump());
  std::fprintf(stderr, "tq: %lld weights in linears, %.4f bits each; tables %s\n",
               static_cast<long long>(plan.n_linear_weights), plan.bits_per_weight(),
               megabytes(plan.table_bytes).c_str());
  if (calib) {
    std::fprintf(stderr, "tq: calibration on %zu samples, %lld tokens\n", calib->samples.size(),
                 static_cast<long long>(calib->n_tokens()));
  }
  std::fprintf(stderr, "tq: file %s, temporary results %s, memory at most %s\n",
               megabytes(plan.output_bytes).c_str(), megabytes(plan.resume_bytes).c_str(),
               megabytes(plan.memory_bytes).c_str());
}

// Mean over linears of a ratio in decibels, exact ones left out.
double mean_db(const std::vector<LinearReport>& linears, bool output) {
  double total = 0;
  int count = 0;
  for (const LinearReport& linear : linears) {
    const double value = output ? linear.output_snr_db.value_or(INFINITY) : linear.weight_snr_db;
    if (!std::isfinite(value)) continue;
    total += value;
    ++count;
  }
  return count ? total / count : INFINITY;
}

void print_summary(const QuantizeResult& result, const std::string& output, double seconds) {
  std::string quality;
  if (std::isfinite(mean_db(result.linears, false))) {
    quality = "; signal to noise " + decibels(mean_db(result.linears, false)) + " dB in weights";
  }
  if (std::isfinite(mean_db(result.linears, true))) {
    quality += ", " + decibels(mean_db(result.linears, true)) + " dB in outputs";
  }
  if (!quality.empty() && result.refined.kept()) quality += " before refinement";
  std::fprintf(stderr, "tq: %s: %s, linears %.4f bits per weight%s; %.1f s, peak memory %s\n",
               printable(output).c_str(), megabytes(result.file_bytes).c_str(),
               result.bits_per_weight, quality.c_str(), seconds,
               megabytes(peak_rss_bytes()).c_str());
}

void write_report(const std::string& path, const QuantizeResult& result, double seconds) {
  Json json;
  json["schema"] = 1;
  json["quantization"] = result.quantization;
  json["file_bytes"] = result.file_bytes;
  json["bits_per_weight"] = result.bits_per_weight;
  json["resumed_layers"] = result.n_resumed;
  json["seconds"] = seconds;
  json["peak_rss_bytes"] = peak_rss_bytes();
  if (!result.basis_losses.empty()) json["basis_losses"] = result.basis_losses;
  const RefineResult& refined = result.refined;
  if (!refined.losses.empty()) {
    json["refine"] = {{"kl", refined.losses},
                      {"kl_before", refined.before},
                      {"kl_after", refined.after},
                      {"kept", refined.kept()}};
  }
  json["linears"] = Json::array();
  for (const LinearReport& linear : result.linears) json["linears"].push_back(to_json(linear));
  write_text_file(path, json.dump(2) + "\n");
}

// The output, and the report if there is one, can be written. Before the model is even opened.
void check_paths(const QuantizeArguments& args) {
  std::vector<std::string> inputs = model_files(args.folder);
  if (!args.calib.empty()) inputs.push_back(args.calib);
  check_output_path(args.output, inputs, args.force);
  ResumeStore::refuse_second_run(args.output);
  if (args.report.empty()) return;
  check_output_path(args.report, inputs, true);
  const auto refuse = [&](const std::string& why) {
    throw Error(ErrorKind::kIo, "cannot write output", args.report, why,
                "choose another name for the report");
  };
  // Absolute first: of a file that does not exist yet only the folder can be made canonical.
  const auto canonical = [](const std::string& path) {
    return std::filesystem::weakly_canonical(
        std::filesystem::absolute(output_target(path, Replace::kAllowed)));
  };
  if (canonical(args.report) == canonical(args.output)) refuse("it is the output itself");
  if (std::filesystem::exists(args.report) && looks_like_tq(args.report)) refuse("it is a model");
}

void quantize(const QuantizeArguments& args) {
  // Whoever reads the progress may go away; the work of hours does not.
  std::signal(SIGPIPE, SIG_IGN);
  const auto start = Clock::now();
  method_preset(args.method);  // an unknown method is reported before a missing file
  check_paths(args);
  const Model model = open_source(args.folder);
  const QuantizeOptions options = make_options(args, model.config);
  const Tokenizer tokenizer = open_tokenizer(model);
  const std::vector<std::string> notes = check_runnable(model, tokenizer);
  if (!args.quiet) {
    print_notes(model, tokenizer);
    for (const std::string& sentence : notes) note(sentence);
  }
  std::optional<Calibration> calibration;
  if (options.needs_calibration()) {
    calibration = make_calibration(args, options, model, tokenizer);
  }
  const QuantizePlan plan = make_plan(model, options, calibration ? calibration->n_tokens() : 0);
  const std::unique_ptr<Backend> backend = open_backend({args.device, options.threads});
  if (!args.dry_run) remove_leftovers(output_target(args.output, Replace::kAllowed));
  // What an earlier run left is used again or removed: either way it is room.
  const uint64_t needed = plan.output_bytes + plan.resume_bytes;
  check_disk_space(args.output, needed - std::min(needed, ResumeStore::held_bytes(args.output)));
  check_memory(plan.memory_bytes);
  const uint64_t weights_hash = scan_weights(model, [&](const Matrix& m) {
    model.release(m);
    check_interrupted();
  });
  if (args.dry_run) {
    print_plan(plan, options, calibration ? &*calibration : nullptr, args.output);
    return;
  }
  if (options.needs_calibration()) say_work_is_kept();
  QuantizeResult result;
  {
    Progress progress(args.quiet);
    const QuantizeHooks hooks{
        [&](const std::string& sentence) { progress.note(sentence); },
        [&](int64_t layer, int64_t n, const char* name) { progress.step(layer, n, name); },
        [&](const char* stage, int64_t step, int64_t n, double loss) {
          progress.descent(stage, step, n, loss);
        },
        interrupted,
        model.release,
        [&](const std::string& path) { try_finished_file(path, args.output, options.threads); }};
    result = quantize_model(model, options, calibration ? &*calibration : nullptr, weights_hash,
                            *backend, args.output, args.resume, hooks,
                            args.force ? Replace::kAllowed : Replace::kNever);
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  if (!args.report.empty()) {
    try {
      write_report(args.report, result, seconds);
    } catch (const Error& error) {
      throw Error(ErrorKind::kIo, "report not written", args.report, error.what(),
                  "the model " + args.output + " is complete");
    }
  }
  if (!args.quiet) print_summary(result, args.output, seconds);
}

void add_method_options(CLI::App& command, QuantizeArguments& args) {
  command.add_option("--method", args.method, "preset: " + method_names())->capture_default_str();
  const std::string of_method = "the method's";
  command
      .add_option("--basis", args.basis,
                  "none, hadamard, learned (one), or layerwise (one for every sublayer)")
      ->check(CLI::IsMember(names_of(kBases)))
      ->default_str(of_method);
  command
      .add_option("--basis-rank", args.basis_rank,
                  "rank of the rotations between layerwise bases, or full")
      ->default_str("32");
  command.add_option("--steps", args.steps, "of learning the basis")
      ->check(number_in(1, 1 << 20))
      ->default_str(std::to_string(kLearningSteps));
  command
      .add_option("--loss", args.loss,
                  "that a learned basis lowers: outputs of each linear (layer), of attention and "
                  "FFN (block), the model's predictions (kl: against the original's, ce: against "
                  "the text)")
      ->check(CLI::IsMember(names_of(kLosses)))
      ->default_str("layer");
  command
      .add_option("--rounding", args.rounding,
                  "rtn, gptq, or gptq-ls (weights corrected for the rounding of their inputs)")
      ->check(CLI::IsMember(names_of(kRoundings)))
      ->default_str(of_method);
  command.add_flag("--act-order", args.act_order,
                   "GPTQ rounds groups of columns with loud inputs first");
  command.add_option("--rank", args.rank, "rank of the low-rank branch, 0 = none")
      ->check(number_in(0, 4096))
      ->default_str("twinquant, svdquant: 32, else 0");
  command
      .add_option("--split", args.split,
                  "where the branch comes from: svd of the weight, or fit to the rounding's error")
      ->check(CLI::IsMember({"svd", "fit"}))
      ->default_str("twinquant: fit, else svd");
  command.add_option("--branch-bits", args.branch_bits, "bits of the branch's factors")
      ->check(CLI::IsMember({16, 8, 4}))
      ->default_str("twinquant: 4, else 16");
  command
      .add_option("--refine-steps", args.refine_steps,
                  "of refining all scales against the original's predictions, 0 = none")
      ->check(number_in(0, 1 << 20))
      ->default_str(of_method);
  command
      .add_option("--bits-w", args.bits_w,
                  "bits of the weights; 3 is stored as 4; 16, 32: unrounded")
      ->check(CLI::IsMember({3, 4, 8, 16, 32}))
      ->default_str("4");
  command.add_option("--bits-a", args.bits_a, "bits of the linears' inputs at run time")
      ->check(CLI::IsMember({3, 4, 8, 16}))
      ->default_str("8");
  command.add_option("--group", args.group, "columns that share a scale")
      ->check(CLI::IsMember({128, 64, 32}))
      ->default_str("64");
  command
      .add_option("--group-a", args.group_a,
                  "columns of a linear's input that share a scale; token: all of them, of the "
                  "input of wo a head")
      ->check(CLI::IsMember({"128", "64", "32", "token"}))
      ->default_str("that of --group");
  command
      .add_option(
          "--act-codes", args.act_codes,
          "codes of rounded inputs: symmetric (-7..7 at 4 bits), all (-8..7), or asymmetric "
          "(16 from the least to the greatest value, for --bits-a 4 and 3)")
      ->check(CLI::IsMember(names_of(kActCodes)))
      ->default_str("learned methods: all, else symmetric");
  command.add_flag(
      "--two-level", args.two_level,
      "scales are whole multiples, up to 15, of one number of the row of weights or of "
      "the token: faster on a GPU");
  command.add_option("--embed-bits", args.embed_bits, "bits of the embedding")
      ->check(CLI::IsMember({16, 8, 4}))
      ->default_str("16");
  command
      .add_option("--head-bits", args.head_bits,
                  "bits of the head; with tied embeddings the same table")
      ->check(CLI::IsMember({16, 8, 4}))
      ->default_str("16");
  command
      .add_option("--kv-bits", args.kv_bits,
                  "bits per cached key or value that the file asks for when it runs")
      ->check(CLI::IsMember({16, 8, 4}))
      ->default_str("16");
  command.add_option("--keep", args.keep,
                     "keep linears matching this regular expression at 16 bits, for example "
                     "layers.0.w_down; may be repeated");
}

}  // namespace

void add_quantize_command(CLI::App& app) {
  auto args = std::make_shared<QuantizeArguments>();
  CLI::App* command = app.add_subcommand("quantize", "a Hugging Face folder to one .tq file");
  command->add_option("folder", args->folder, "folder with config.json and safetensors")
      ->required();
  command->add_option("-o,--output", args->output, "the .tq file to write")->required();
  add_method_options(*command, *args);
  command
      ->add_option("--calib", args->calib,
                   "calibration text, or JSON with a \"text\" a line or item")
      ->default_str("built in");
  command->add_option("--calib-samples", args->calib_samples, "windows of text to calibrate on")
      ->check(number_in(1, 1 << 20))
      ->default_str(std::to_string(QuantizeOptions{}.calib_samples));
  command->add_option("--calib-length", args->calib_length, "tokens a window")
      ->check(number_in(1, 1 << 20))
      ->default_str(std::to_string(QuantizeOptions{}.calib_length));
  command->add_option("--seed", args->seed, "of random rotations")
      ->check(number_in(0, 9007199254740992.0))
      ->capture_default_str();
  command->add_option("--threads", args->threads, "CPU threads; 0 = all cores; never changes bytes")
      ->check(number_in(0, 1024))
      ->capture_default_str();
  command
      ->add_option("--device", args->device,
                   "cpu or cuda: where the calibration text runs through the layers; the last bits "
                   "of what is rounded depend on it")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  command->add_flag("--dry-run", args->dry_run, "check everything, print the plan, write nothing");
  command->add_flag("--resume", args->resume, "continue an interrupted run (OUTPUT.resume)");
  command->add_flag("--force", args->force, "replace an existing output");
  command->add_option("--report", args->report, "write distortion of every linear as JSON")
      ->check(not_empty());
  command->add_flag("-q,--quiet", args->quiet, "nothing on stderr but errors");
  command->footer(
      "While calibrating, finished layers are kept in OUTPUT.resume/ and removed at the end.");
  command->callback([args] { quantize(*args); });
}

}  // namespace tq
