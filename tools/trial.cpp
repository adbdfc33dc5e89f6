// trial - see trial.h.
#include "tools/trial.h"

#include <algorithm>
#include <vector>

#include "cpu/cpu_backend.h"
#include "tools/runtime.h"

namespace tq {

void try_finished_file(const std::string& path, const std::string& output, int threads) {
  constexpr int64_t kTokens = 16;
  Model model = load_tq_file(path);
  model.source = output;
  CpuBackend backend(threads);
  const PreparedModel prepared(model, backend, LayerResidence::kOneAtATime);
  SessionOptions options = default_session(model, backend);
  options.ctx = std::min(kTokens, model.config.max_seq_len);
  Session session(prepared, options);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < options.ctx; ++i) {
    tokens.push_back(static_cast<int32_t>(i * model.config.vocab_size / options.ctx));
  }
  session.feed_all(tokens, [](int64_t, int64_t, std::span<const float>) {});
}

}  // namespace tq
