// fuzz_tq - a .tq file whose checksums are made right again, and one forward step.
//
// Checksums would stop every mutation at the door; who writes a hostile file writes them right.
#include <xxhash.h>

#include <cstring>

#include "cpu/cpu_backend.h"
#include "model/forward.h"
#include "model/json.h"
#include "model/tq_layout.h"
#include "tests/fuzz/fuzz.h"

namespace tq {
namespace {

// Checksums of the tensors that lie inside the file. What is not JSON stays as it is.
std::string repaired_header(const std::string& header, std::string_view body) {
  Json json = Json::parse(header, nullptr, false);
  if (!json.is_object() || !json.contains("tensors") || !json["tensors"].is_array()) return header;
  for (Json& tensor : json["tensors"]) {
    if (!tensor.is_object()) continue;
    const Json offset = tensor.value("offset", Json()), bytes = tensor.value("bytes", Json());
    if (!offset.is_number_unsigned() || !bytes.is_number_unsigned()) continue;
    const uint64_t begin = offset, length = bytes;
    if (begin > body.size() || length > body.size() - begin) continue;
    tensor["xxh3"] = hash_text(XXH3_64bits(body.data() + begin, length));
  }
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string repaired(std::string file) {
  TqPrologue prologue;
  if (file.size() < sizeof prologue) return file;
  std::memcpy(&prologue, file.data(), sizeof prologue);
  std::memcpy(prologue.magic, kTqMagic, sizeof kTqMagic);
  const uint64_t at = prologue.header_offset;
  if (at < sizeof prologue || at > file.size()) return file;
  const std::string header = repaired_header(file.substr(at), std::string_view(file).substr(0, at));
  file.resize(at);
  file += header;
  prologue.header_bytes = header.size();
  prologue.header_hash = XXH3_64bits(header.data(), header.size());
  prologue.file_bytes = file.size();
  prologue.prologue_hash = XXH3_64bits(&prologue, offsetof(TqPrologue, prologue_hash));
  std::memcpy(file.data(), &prologue, sizeof prologue);
  return file;
}

void step(const Model& model) {
  CpuBackend backend(1);
  const PreparedModel prepared(model, backend);
  SessionOptions options;
  options.ctx = 2;
  options.kv_bits = model.kv_bits;
  Session session(prepared, options);
  const int32_t ids[] = {0, static_cast<int32_t>(model.config.vocab_size - 1)};
  static_cast<void>(session.feed(ids));
}

}  // namespace
}  // namespace tq

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tq;
  const std::string path = write_file("model.tq", repaired(std::string(as_text(data, size))));
  expect_result_or_refusal([&] { step(load_tq_file(path)); });
  return 0;
}
