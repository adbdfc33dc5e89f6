// trial - see trial.h.
#include "tools/trial.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/cpu_backend.h"
#include "model/error.h"
#include "tools/runtime.h"

namespace tq {
namespace {

std::vector<float> trial_logits(const PreparedModel& prepared, SessionOptions options,
                                int kv_bits) {
  options.kv_bits = kv_bits;
  const int64_t vocab = prepared.config().vocab_size;
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < options.ctx; ++i) {
    tokens.push_back(static_cast<int32_t>(i * vocab / options.ctx));
  }
  std::vector<float> logits;
  Session session(prepared, options);
  session.feed_all(tokens, [&](int64_t, int64_t, std::span<const float> block) {
    logits.insert(logits.end(), block.begin(), block.end());
  });
  return logits;
}

}  // namespace

void try_finished_file(const std::string& path, const std::string& output, int threads) {
  constexpr int64_t kTokens = 16;
  Model model = load_tq_file(path);
  model.source = output;
  CpuBackend backend(threads);
  const PreparedModel prepared(model, backend, LayerResidence::kOneAtATime);
  SessionOptions options = default_session(model, backend);
  options.ctx = std::min(kTokens, model.config.max_seq_len);
  const std::vector<float> wide = trial_logits(prepared, options, 32);
  const std::vector<float> narrow = trial_logits(prepared, options, 16);
  double error = 0, size = 0;
  for (size_t i = 0; i < wide.size(); ++i) {
    error += std::pow(double{narrow[i]} - double{wide[i]}, 2);
    size += std::pow(double{wide[i]}, 2);
  }
  // Rounding to 16 bits costs a thousandth; this much only numbers lose that f16 cannot hold.
  if (error > 0.25 * size) {
    throw Error(ErrorKind::kBadData, "the KV cache cannot hold this model's numbers", output,
                "keys or values are so small or large that 16 bits change the logits by half",
                "the folder runs with --kv-bits 32");
  }
}

}  // namespace tq
