// test_resume - an interrupted run goes on to the same bytes, whatever has happened to what it
// kept: files swapped, cut, flipped, of another run; a second run at the same time; a source that
// changes. The rest about resuming is in test_pipeline.cpp.
#include <gtest/gtest.h>

#include "cpu/cpu_backend.h"
#include "model/error.h"
#include "model/input_file.h"
#include "quant/pipeline.h"
#include "quant/resume.h"
#include "tests/expect_error.h"
#include "tests/temp_dir.h"
#include "tests/tiny_model.h"

namespace tq {
namespace {

namespace fs = std::filesystem;

Calibration tiny_calibration() {
  return cut_samples(random_ids(200, 96, 4), 4, 48, 96, "test");
}

QuantizeOptions tiny_options(const std::string& method, uint64_t seed = 0) {
  QuantizeOptions options = method_preset(method);
  options.threads = 2;
  options.seed = seed;
  options.steps = options.steps > 0 ? 5 : 0;
  options.basis_rank = 8;
  options.refine_steps = std::min<int64_t>(options.refine_steps, 2);
  return options;
}

// One output and the runs into it.
class Runs {
 public:
  explicit Runs(const QuantizeOptions& options, const std::string& name = "m.tq")
      : options_(options), output_(folder_ / name) {}

  QuantizeResult run(bool resume, const QuantizeHooks& hooks = {}) {
    CpuBackend backend(2);
    const Calibration calibration = tiny_calibration();
    return quantize_model(source, options_, &calibration, 1, backend, output_, resume, hooks);
  }
  // Stops where `at` says so for the step of a layer; the message.
  std::string stop_at(const std::function<bool(int64_t layer, const std::string& step)>& at,
                      bool resume = false) {
    bool stopped = false;
    QuantizeHooks hooks;
    hooks.progress = [&](int64_t layer, int64_t, const char* step) {
      stopped = stopped || at(layer, step);
    };
    return interrupted(hooks, stopped, resume);
  }
  // Stops after a step of a descent.
  std::string stop_after(const std::string& stage, int64_t n_steps, bool resume = false) {
    bool stopped = false;
    QuantizeHooks hooks;
    hooks.descent = [&](const char* at, int64_t step, int64_t, double) {
      stopped = stopped || (at == stage && step == n_steps);
    };
    return interrupted(hooks, stopped, resume);
  }
  std::string bytes() const { return read_bytes(output_); }
  std::string kept(const std::string& name) const { return output_ + ".resume/" + name; }
  const std::string& output() const { return output_; }
  bool left_nothing() const { return names_in(folder_.path()).empty(); }

  const TinyModel tiny{true};
  Model source = tiny.model();

 private:
  std::string interrupted(QuantizeHooks& hooks, const bool& stopped, bool resume) {
    hooks.interrupted = [&] { return stopped; };
    try {
      run(resume, hooks);
      ADD_FAILURE() << "not interrupted";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kInterrupted) << error.what();
      return error.what();
    }
    return "";
  }
  QuantizeOptions options_;
  TempDir folder_;
  std::string output_;
};

std::string whole_run(const QuantizeOptions& options) {
  Runs runs(options);
  runs.run(false);
  return runs.bytes();
}

bool in_rounding_of_2(int64_t layer, const std::string& step) {
  return layer == 2 && step == "rounding";
}

TEST(ResumeFiles, OnesInThePlaceOfOthersAreMadeAgain) {
  const QuantizeOptions options = tiny_options("spinquant");
  const std::string expected = whole_run(options);
  Runs other(tiny_options("spinquant", 7));
  other.stop_at(in_rounding_of_2);
  const auto flip = [](const std::string& path, size_t at) {
    std::string bytes = read_bytes(path);
    bytes[at % bytes.size()] ^= 16;
    write_bytes(path, bytes);
  };
  using Damage = std::function<void(const Runs&)>;
  const Damage damages[] = {
      [](const Runs& r) {  // swapped
        fs::rename(r.kept("layer-00000.bin"), r.kept("x"));
        fs::rename(r.kept("layer-00001.bin"), r.kept("layer-00000.bin"));
        fs::rename(r.kept("x"), r.kept("layer-00001.bin"));
      },
      [](const Runs& r) {  // twice the same
        fs::copy_file(r.kept("layer-00000.bin"), r.kept("layer-00001.bin"),
                      fs::copy_options::overwrite_existing);
      },
      [&](const Runs& r) {  // of another run
        fs::copy_file(other.kept("layer-00001.bin"), r.kept("layer-00001.bin"),
                      fs::copy_options::overwrite_existing);
      },
      [&](const Runs& r) {
        fs::copy_file(other.kept("learned.bin"), r.kept("learned.bin"),
                      fs::copy_options::overwrite_existing);
      },
      [](const Runs& r) { fs::resize_file(r.kept("layer-00000.bin"), 1000); },
      [](const Runs& r) { fs::resize_file(r.kept("learned.bin"), 0); },
      [&](const Runs& r) { flip(r.kept("layer-00001.bin"), 54321); },
      [&](const Runs& r) { flip(r.kept("learned.bin"), 12345); },
      [](const Runs& r) { fs::remove(r.kept("layer-00000.bin")); },
      [](const Runs& r) { fs::remove(r.kept("learned.bin")); },
  };
  for (const Damage& damage : damages) {
    Runs runs(options);
    runs.stop_at(in_rounding_of_2);
    damage(runs);
    runs.run(true);
    EXPECT_EQ(runs.bytes(), expected) << "damage " << &damage - damages;
  }
}

// Every way to a learned basis.
std::vector<QuantizeOptions> learned_methods() {
  std::vector<QuantizeOptions> all = {tiny_options("spinquant"), tiny_options("respinquant"),
                                      tiny_options("twinquant"), tiny_options("spinquant")};
  all[2].split = Split::kSvd;
  all[3].loss = LearningLoss::kKl;
  return all;
}

TEST(ResumeLearning, GoesOnFromTheStepWhereItWasInterrupted) {
  for (const QuantizeOptions& options : learned_methods()) {
    Runs whole(options);
    const QuantizeResult expected = whole.run(false);
    Runs runs(options);
    int64_t n_stops = 0;
    for (int64_t step : {1, 2, 4}) {
      const std::string message = runs.stop_after("learning", step, n_stops++ > 0);
      EXPECT_NE(message.find("the basis as learned so far"), std::string::npos) << message;
      EXPECT_TRUE(fs::exists(runs.kept("learning.bin")));
    }
    int64_t first = 0;
    QuantizeHooks hooks;
    hooks.descent = [&](const char* stage, int64_t step, int64_t, double) {
      if (first == 0 && std::string(stage) == "learning") first = step;
    };
    const QuantizeResult result = runs.run(true, hooks);
    EXPECT_EQ(first, 5);
    EXPECT_EQ(result.basis_losses, expected.basis_losses);
    EXPECT_EQ(runs.bytes(), whole.bytes());
  }
}

TEST(ResumeLearning, ADamagedStateIsMadeAgain) {
  const QuantizeOptions options = tiny_options("spinquant");
  const std::string expected = whole_run(options);
  for (size_t size : {size_t{0}, size_t{100}, size_t{5000}}) {
    Runs runs(options);
    runs.stop_after("learning", 2);
    fs::resize_file(runs.kept("learning.bin"), size);
    std::string notes;
    QuantizeHooks hooks;
    hooks.note = [&](const std::string& note) { notes += note; };
    runs.run(true, hooks);
    EXPECT_NE(notes.find("learning.bin"), std::string::npos) << notes;
    EXPECT_EQ(runs.bytes(), expected);
  }
}

TEST(ResumeMessage, SaysWhatIsKept) {
  Runs runs(tiny_options("twinquant"));
  const auto has = [](const std::string& message, const std::string& words) {
    EXPECT_NE(message.find(words), std::string::npos) << message;
  };
  std::string message = runs.stop_at(
      [](int64_t layer, const std::string& step) { return step == "sampling" && layer == 1; });
  has(message, "nothing was finished");
  EXPECT_EQ(message.find("--resume"), std::string::npos) << message;
  EXPECT_TRUE(runs.left_nothing());
  has(runs.stop_after("learning", 3), "the basis as learned so far");
  has(runs.stop_at([](int64_t layer,
                      const std::string& step) { return step == "calibrating" && layer == 0; },
                   true),
      ": the learned basis;");
  has(runs.stop_at(in_rounding_of_2, true), "the learned basis and 2 finished layers");
  has(runs.stop_after("refining", 1, true), "the learned basis and 3 finished layers");
}

TEST(ResumeLock, ASecondRunIsRefusedByNameAndHarmsNothing) {
  const QuantizeOptions options = tiny_options("quarot");
  const std::string expected = whole_run(options);
  Runs runs(options);
  runs.stop_at(in_rounding_of_2);
  {
    ResumeStore first(runs.output());
    first.lock();
    for (bool resume : {false, true}) {
      expect_error(ErrorKind::kIo, {"m.tq.resume", "another tq"}, [&] { runs.run(resume); });
    }
    expect_error(ErrorKind::kIo, {"another tq"},
                 [&] { ResumeStore::refuse_second_run(runs.output()); });
  }
  ResumeStore::refuse_second_run(runs.output());
  EXPECT_EQ(runs.run(true).n_resumed, 2);
  EXPECT_EQ(runs.bytes(), expected);
}

TEST(ResumeLock, AFailureBeforeAnythingIsFinishedLeavesNothing) {
  Runs runs(tiny_options("quarot"));
  QuantizeHooks hooks;
  hooks.progress = [&](int64_t, int64_t, const char*) {
    throw Error(ErrorKind::kResource, "out of memory", "test", "no more");
  };
  expect_error(ErrorKind::kResource, {"no more"}, [&] { runs.run(false, hooks); });
  EXPECT_TRUE(runs.left_nothing());
}

TEST(ResumeSpace, WhatAnEarlierRunHoldsIsCounted) {
  Runs runs(tiny_options("quarot"));
  EXPECT_EQ(ResumeStore::held_bytes(runs.output()), 0u);
  runs.stop_at(in_rounding_of_2);
  uint64_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(runs.kept(""))) bytes += entry.file_size();
  write_bytes(runs.kept("notes of the user"), "not ours");
  EXPECT_EQ(ResumeStore::held_bytes(runs.output()), bytes);
}

TEST(ResumeSource, WorkOnAFileThatHasChangedIsNotKept) {
  TempDir dir;
  for (const char* stage : {"calibrating", ""}) {
    write_bytes(dir / "weights", "as they were");
    const MappedFile weights(dir / "weights");
    Runs runs(tiny_options("quarot"));
    runs.source.check_unchanged = [&] { weights.check_unchanged(); };
    QuantizeHooks hooks;
    hooks.progress = [&](int64_t layer, int64_t, const char* step) {
      if (layer == 2 && std::string(step) == stage) write_bytes(dir / "weights", "others");
    };
    expect_error(ErrorKind::kIo, {"weights", "changed while it was read"},
                 [&] { runs.run(false, hooks); });
    EXPECT_FALSE(fs::exists(runs.output()));
    EXPECT_EQ(fs::exists(runs.kept("layer-00002.bin")), *stage == '\0');
  }
}

}  // namespace
}  // namespace tq
