// fuzz_jsonl - JSON lines: questions of `tq eval --task`, calibration texts, and the strict JSON
// reader itself.
#include "model/json.h"
#include "tests/fuzz/fuzz.h"
#include "tools/calibration_text.h"
#include "tools/tasks.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tq;
  const std::string_view text = as_text(data, size);
  expect_result_or_refusal([&] {
    const Task task = parse_task(text, "tasks.jsonl");
    for (const Question& question : task.questions) {
      TQ_FUZZ_EXPECT(question.gold >= 0 &&
                     question.gold < static_cast<int64_t>(question.candidates.size()));
      for (const AnswerCandidate& candidate : question.candidates) {
        TQ_FUZZ_EXPECT(!candidate.continuation.empty());
      }
    }
  });
  for (const char* name : {"calib.txt", "calib.jsonl"}) {
    expect_result_or_refusal([&] { static_cast<void>(calibration_text(text, name)); });
  }
  expect_result_or_refusal([&] {
    const Json json = parse_json(text.substr(0, text.find('\n')), "line 1");
    // What is read strictly is written and read again unchanged.
    TQ_FUZZ_EXPECT(parse_json(json.dump(), "again").dump() == json.dump());
    if (json.is_object()) static_cast<void>(require_string(json, "text", "line 1"));
  });
  return 0;
}
