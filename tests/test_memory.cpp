// test_memory - memory is counted before it is taken: activations, KV cache and scratch of a
// session.
#include <gtest/gtest.h>

#include "cpu/cpu_backend.h"
#include "model/forward.h"
#include "model/memory.h"
#include "tests/cli.h"
#include "tests/expect_error.h"
#include "tests/tiny_model.h"

namespace tq {
namespace {

// The CPU, with a memory of a given size, that counts what it hands out.
class SmallBackend : public CpuBackend {
 public:
  explicit SmallBackend(uint64_t bytes) : CpuBackend(1), bytes_(bytes) {}
  uint64_t available_bytes() const override { return bytes_; }
  BufferPtr alloc(int64_t n_floats) override {
    n_allocated += 4 * n_floats;
    return CpuBackend::alloc(n_floats);
  }
  int64_t n_allocated = 0;

 private:
  uint64_t bytes_;
};

TEST(Memory, ASessionThatDoesNotFitIsRefusedBeforeItAllocates) {
  const TinyModel tiny(false);
  SmallBackend backend(1 << 20);
  const PreparedModel prepared(tiny.model(), backend);
  const int64_t before = backend.n_allocated;
  SessionOptions options;
  options.ctx = 512;
  try {
    const Session session(prepared, options);
    ADD_FAILURE() << "not refused";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kResource);
    const std::string line = error.what();
    EXPECT_NE(line.find("activations and KV cache need 0.01 GB, 0.00 GB are available"),
              std::string::npos)
        << line;
  }
  EXPECT_EQ(backend.n_allocated, before);
}

TEST(Memory, WhatIsCountedIsAtLeastWhatIsAllocated) {
  for (bool tied : {false, true}) {
    const TinyModel tiny(tied);
    SmallBackend backend(UINT64_MAX);
    const PreparedModel prepared(tiny.model(), backend);
    const int64_t before = backend.n_allocated;
    SessionOptions options;
    options.ctx = 300;
    options.chunk = 200;
    const Session session(prepared, options);
    const double allocated = static_cast<double>(backend.n_allocated - before +
                                                 backend.kv_bytes(tiny.model().config, 300, 16));
    const double counted = session_bytes(backend, tiny.model().config, options);
    EXPECT_GE(counted, allocated);
    EXPECT_LE(counted, 2 * allocated);
  }
}

TEST(Memory, AWideModelIsRefusedWithTheNumbers) {
  TempDir dir;
  const std::string model = copy_model(dir);
  edit_json(model + "/config.json", [](Json& c) { c["max_position_embeddings"] = 1 << 24; });
  CliOptions options;
  options.memory_limit = rlim_t{2} << 30;
  const CliResult result =
      run_tq(dir, {"run", model, "Once", "--ctx", "16000000", "--threads", "1", "-q"}, options);
#if !defined(__SANITIZE_ADDRESS__)  // which needs terabytes of address space
  EXPECT_EQ(result.exit_code, 4) << result.err;
  EXPECT_NE(result.err.find("tq: error: not enough memory (context of 16000000 tokens): "
                            "activations and KV cache need "),
            std::string::npos)
      << result.err;
  EXPECT_EQ(result.out, "");
#endif
}

TEST(Memory, AvailableMemoryKnowsTheMachine) {
  EXPECT_GT(available_memory(), uint64_t{1} << 20);
  EXPECT_LT(available_memory(), uint64_t{1} << 50);
}

}  // namespace
}  // namespace tq
