// fuzz_safetensors - a weights file, or (where the first byte is 'i') an index beside two of them.
#include <cstring>

#include "model/safetensors.h"
#include "tests/fuzz/fuzz.h"

namespace tq {
namespace {

// One tensor of two floats.
std::string small_shard(const std::string& name) {
  const std::string header =
      "{\"" + name + "\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}";
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + std::string(8, '\1');
}

// Every byte that a view promises is there.
void touch(const SafetensorsFolder& folder) {
  for (const std::string& name : folder.names()) {
    TQ_FUZZ_EXPECT(folder.contains(name));
  }
  uint64_t sum = 0;
  for (const std::string& path : folder.paths()) {
    const SafetensorsFile file(path);
    for (const auto& [name, view] : file.tensors()) {
      const auto* bytes = reinterpret_cast<const unsigned char*>(view.data);
      if (view.n_bytes() > 0) sum += bytes[0] + bytes[view.n_bytes() - 1];
    }
  }
  TQ_FUZZ_EXPECT(sum + 1 > 0);  // or the reads would be left out
}

}  // namespace
}  // namespace tq

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tq;
  const std::string_view text = as_text(data, size);
  const bool index = text.starts_with('i');
  unlink((fuzz_folder() + "/model.safetensors").c_str());
  unlink((fuzz_folder() + "/model.safetensors.index.json").c_str());
  if (index) {
    write_file("model-00001-of-00002.safetensors", small_shard("a"));
    write_file("model-00002-of-00002.safetensors", small_shard("b"));
    write_file("model.safetensors.index.json", text.substr(1));
  } else {
    write_file("model.safetensors", text);
  }
  expect_result_or_refusal([] { touch(SafetensorsFolder(fuzz_folder())); });
  return 0;
}
