// fuzz_config - config.json and the angles that follow from it.
#include <cmath>

#include "model/config.h"
#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tq;
  expect_result_or_refusal([&] {
    const Config config = parse_config(std::string(as_text(data, size)), "config.json");
    TQ_FUZZ_EXPECT(config.dim > 0 && config.n_layers > 0 && config.n_heads > 0);
    TQ_FUZZ_EXPECT(config.n_kv_heads > 0 && config.n_heads % config.n_kv_heads == 0);
    if (config.head_dim > 4096) return;
    for (float angle : rope_inv_freq(config.rope, config.head_dim)) {
      TQ_FUZZ_EXPECT(std::isfinite(angle));
    }
  });
  return 0;
}
