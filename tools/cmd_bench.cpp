// cmd_bench - `tq bench`: prefill and decode speed, and how much of the memory's read bandwidth
// decoding uses. Tokenisation is outside the timed part, and so is sampling but for the choice of
// the likeliest token.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>

#ifdef TQ_WITH_CUDA
#include "cuda/cuda_backend.h"
#endif
#include "cpu/parallel.h"
#include "model/error.h"
#include "tools/commands.h"
#include "tools/profile_backend.h"
#include "tools/runtime.h"
#include "tools/shape_model.h"

namespace tq {
namespace {

struct BenchOptions {
  std::string model, shape;
  ShapeOptions shape_options;
  int64_t prompt = 512, decode = 128, repeat = 5;
  DeviceOptions device;
  bool json = false, profile = false;
};

double seconds_of(const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Stats {
  double mean = 0, sd = 0;
};

Stats stats_of(const std::vector<double>& values) {
  Stats stats;
  for (double value : values) stats.mean += value / static_cast<double>(values.size());
  for (double value : values) stats.sd += (value - stats.mean) * (value - stats.mean);
  stats.sd = values.size() > 1 ? std::sqrt(stats.sd / static_cast<double>(values.size() - 1)) : 0;
  return stats;
}

// Best of five sums over 512 MB: far beyond any cache, read-only, as decoding is.
double read_bandwidth(int threads) {
  std::vector<uint64_t> data(size_t{64} << 20, 1);
  double best = 0;
  uint64_t total = 0;
  for (int i = 0; i < 5; ++i) {
    const double seconds = seconds_of([&] {
      std::atomic<uint64_t> sums = 0;
      parallel_ranges(
          threads, std::ssize(data),
          [&](int64_t begin, int64_t end, int) {
            uint64_t sum = 0;
            for (int64_t block = begin; block < end; block += 8) {
              for (int64_t j = 0; j < 8; ++j) sum += data[static_cast<size_t>(block + j)];
            }
            sums += sum;
          },
          8);
      total += sums;
    });
    best = std::max(best, static_cast<double>(data.size() * 8) / seconds);
  }
  TQ_CHECK(total == 5 * data.size());  // keeps the loop from being optimised away
  return best;
}

// Bytes that one decoded token must read: every weight once (the head is a weight, the embedding
// one row; a dense residual basis is used both ways), and the keys and values of the positions
// before it.
uint64_t bytes_per_token(const Model& model, int64_t position, int kv_bits) {
  uint64_t bytes = model.lm_head.n_bytes() + transform_bytes(model.residual_basis) +
                   transform_bytes(model.last_basis());
  for (const Layer& layer : model.layers) {
    for (const NamedLinear& named : kLayerLinears) bytes += (layer.*named.member).n_bytes();
    bytes += skip_bytes(layer);
  }
  return bytes + static_cast<uint64_t>(position * kv_token_bytes(model.config, kv_bits));
}

std::vector<int32_t> bench_tokens(int64_t n_ids, int64_t count) {
  // Spread over the vocabulary, always the same.
  std::vector<int32_t> ids(static_cast<size_t>(count));
  uint64_t state = 1;
  for (int32_t& id : ids) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    id = static_cast<int32_t>((state >> 33) % static_cast<uint64_t>(n_ids));
  }
  return ids;
}

// The share of the device's own read bandwidth says how far decoding is from its limit.
double device_bandwidth(const Backend& backend, int threads) {
#ifdef TQ_WITH_CUDA
  if (backend.name().starts_with("cuda")) return cuda_read_bandwidth();
#else
  (void)backend;
#endif
  return read_bandwidth(threads);
}

void bench(const BenchOptions& options) {
  if (options.model.empty() == options.shape.empty()) {
    throw Error(ErrorKind::kUsage, "one model is needed", "tq bench", "give a file or --shape");
  }
  const Model model = options.shape.empty() ? load_model(options.model, options.device.verify)
                                            : random_model(options.shape, options.shape_options);
  const int64_t n_ids =
      options.shape.empty() ? open_tokenizer(model).size() : model.config.vocab_size;
  std::map<std::string, OpTime> op_times;
  std::unique_ptr<Backend> backend = open_backend(options.device);
  if (options.profile) backend = make_profile_backend(std::move(backend), op_times);
  const PreparedModel prepared(model, *backend);
  const int64_t ctx = checked_ctx(model, options.prompt + options.decode);
  SessionOptions session_options = default_session(model, *backend);
  session_options.ctx = ctx;
  session_options.valid_vocab = n_ids;
  if (options.device.kv_bits) session_options.kv_bits = options.device.kv_bits;
  Session session(prepared, session_options);
  const std::vector<int32_t> ids = bench_tokens(n_ids, ctx);
  const std::span<const int32_t> prompt(ids.data(), static_cast<size_t>(options.prompt));

  std::vector<double> prefill, decode;
  for (int64_t i = -1; i < options.repeat; ++i) {  // the first round warms up
    check_interrupted();
    session.truncate(0);
    if (i <= 0) op_times.clear();
    const double prefill_seconds = seconds_of([&] { session.feed_top(prompt, 1); });
    const double decode_seconds = seconds_of([&] {
      for (int64_t t = 0; t < options.decode; ++t) {
        session.feed_top(std::span(&ids[static_cast<size_t>(options.prompt + t)], 1), 1);
      }
    });
    if (i < 0) continue;
    prefill.push_back(static_cast<double>(options.prompt) / prefill_seconds);
    if (options.decode > 0) decode.push_back(static_cast<double>(options.decode) / decode_seconds);
  }
  const int threads = options.device.threads > 0 ? options.device.threads : available_processors();
  const double bandwidth = device_bandwidth(*backend, threads);
  const uint64_t bytes =
      bytes_per_token(model, options.prompt + options.decode / 2, session_options.kv_bits);
  const Stats p = stats_of(prefill), d = decode.empty() ? Stats{} : stats_of(decode);
  const double share = d.mean * static_cast<double>(bytes) / bandwidth;
  Json json = {{"schema", 1},
               {"device", backend->name()},
               {"threads", threads},
               {"prompt", options.prompt},
               {"decode", options.decode},
               {"repeat", options.repeat},
               {"prefill_tok_per_s", p.mean},
               {"prefill_sd", p.sd},
               {"decode_tok_per_s", d.mean},
               {"decode_sd", d.sd},
               {"bytes_per_token", bytes},
               {"read_bandwidth_bytes_per_s", bandwidth},
               {"decode_share_of_bandwidth", share},
               {"kv_bits", session_options.kv_bits},
               {"peak_rss_bytes", peak_rss_bytes()}};
  for (const auto& [op, time] : op_times) {
    json["profile"][op] = {{"seconds", time.seconds}, {"calls", time.calls}};
  }
  if (options.json) {
    write_json(json);
    return;
  }
  char text[512];
  std::snprintf(text, sizeof text,
                "%s\nprefill %lld tokens: %.1f +- %.1f tok/s\ndecode %lld tokens: %.1f "
                "+- %.1f tok/s, %.1f MB a token, %.0f %% of %.1f GB/s read bandwidth\n",
                backend->name().c_str(), static_cast<long long>(options.prompt), p.mean, p.sd,
                static_cast<long long>(options.decode), d.mean, d.sd,
                static_cast<double>(bytes) / 1e6, 100 * share, bandwidth / 1e9);
  std::string out = text;
  for (const auto& [op, time] : op_times) {
    std::snprintf(text, sizeof text, "  %-28s %9.3f s %9lld calls\n", op.c_str(), time.seconds,
                  static_cast<long long>(time.calls));
    out += text;
  }
  write_result(out);
}

}  // namespace

void add_bench_command(CLI::App& app) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App* command = app.add_subcommand("bench", "speed of prefill and decode");
  command->add_option("model", options->model, ".tq file or Hugging Face folder");
  command
      ->add_option("--shape", options->shape, "random weights of a known shape instead of a file")
      ->check(CLI::IsMember(shape_names()));
  ShapeOptions& shape = options->shape_options;
  command->add_option("--bits-w", shape.bits_w, "of a shape: bits of the linears, 4 or 16")
      ->check(CLI::IsMember({4, 16}))
      ->capture_default_str();
  command->add_option("--bits-a", shape.bits_a, "of a shape: bits of their inputs")
      ->check(CLI::IsMember({4, 8, 16}))
      ->capture_default_str();
  command->add_option("--head-bits", shape.head_bits, "of a shape: bits of embedding and head")
      ->check(CLI::IsMember({4, 8, 16}))
      ->capture_default_str();
  command->add_option("--group", shape.group, "of a shape: columns of a scale")
      ->check(CLI::IsMember({32, 64, 128}))
      ->capture_default_str();
  command->add_flag("--two-level", shape.two_level, "of a shape: two-level scales");
  command->add_option("--rank", shape.rank, "of a shape: rank of the low-rank component")
      ->check(number_in(0, 1024))
      ->capture_default_str();
  command->add_option("-p,--prompt", options->prompt, "prompt tokens")
      ->check(number_in(1, 1 << 24))
      ->capture_default_str();
  command->add_option("-n,--decode", options->decode, "decoded tokens")
      ->check(number_in(0, 1 << 24))
      ->capture_default_str();
  command->add_option("-r,--repeat", options->repeat, "repetitions")
      ->check(number_in(1, 1000))
      ->capture_default_str();
  command->add_flag("--json", options->json, "one JSON object on stdout");
  command->add_flag("--profile", options->profile, "time per operation");
  add_device_options(*command, options->device, true);
  command->callback([options] { bench(*options); });
}

}  // namespace tq
