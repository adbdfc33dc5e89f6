// folder_files - see folder_files.h.
#include "model/folder_files.h"

#include <algorithm>
#include <filesystem>

#include "model/error.h"
#include "model/json.h"

namespace tq {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxAdapterBytes = 1 << 20;

bool is_inside(const fs::path& path, const fs::path& folder) {
  const auto [end, unused] = std::mismatch(folder.begin(), folder.end(), path.begin(), path.end());
  return end == folder.end();
}

// X/snapshots/REVISION/file -> X/blobs/HASH, and a folder made elsewhere with links into
// models--OWNER--NAME/blobs: the two layouts of huggingface_hub.
bool is_cache_blob(const fs::path& file, const fs::path& folder) {
  const fs::path blobs = file.parent_path(), cache = blobs.parent_path();
  if (blobs.filename() != "blobs") return false;
  if (cache.filename().string().starts_with("models--")) return true;
  return folder.parent_path().filename() == "snapshots" &&
         folder.parent_path().parent_path() == cache;
}

void check_link(const std::string& folder, const std::string& name) {
  const fs::path path = fs::path(folder) / name;
  std::error_code failure;
  if (!fs::is_symlink(fs::symlink_status(path, failure))) return;
  const fs::path file = fs::canonical(path, failure);
  if (failure) {
    throw Error(ErrorKind::kIo, "cannot follow link", path.string(), failure.message());
  }
  const fs::path own = fs::canonical(folder, failure);
  if (is_inside(file, own) || is_cache_blob(file, own)) return;
  throw Error(ErrorKind::kIo, "link leaves the model folder", path.string(),
              "it leads to " + file.string() +
                  "; links inside the folder and to the blobs of a Hugging Face cache are followed",
              "copy the file into the folder");
}

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

// "" for what is not weights.
std::string weight_format(const std::string& name) {
  const auto ends = [&](const char* ending) { return name.ends_with(ending); };
  if (name.starts_with("adapter_model.")) return "";  // told with its config
  if (ends(".safetensors")) return "safetensors";
  if (ends(".gguf")) return "GGUF";
  // Not what a training leaves beside its weights: optimizer.pt, rng_state.pth, training_args.bin.
  const bool model = name.find("model") != std::string::npos || name.starts_with("consolidated");
  if (model && (ends(".pth") || ends(".pt") || ends(".bin"))) return "PyTorch";
  if (name == "tf_model.h5") return "TensorFlow";
  if (name.starts_with("flax_model") && ends(".msgpack")) return "Flax";
  if (ends(".onnx")) return "ONNX";
  return "";
}

bool has_adapter(const std::string& folder) {
  return in_folder(folder, "adapter_config.json") ||
         in_folder(folder, "adapter_model.safetensors") || in_folder(folder, "adapter_model.bin");
}

// " of BASE" where the adapter names the model it was made for.
std::string adapter_base(const std::string& folder) {
  try {
    const std::string text = folder_text(folder, "adapter_config.json", kMaxAdapterBytes);
    const Json json = parse_json(text, folder + "/adapter_config.json");
    return " of " + require_string(json, "base_model_name_or_path", folder).substr(0, 200);
  } catch (const Error&) {
    return "";  // it only helps to explain
  }
}

// "a.bin and 3 more".
std::string listed(const std::vector<std::string>& names) {
  return names[0] +
         (names.size() > 1 ? " and " + std::to_string(names.size() - 1) + " more" : std::string());
}

}  // namespace

bool in_folder(const std::string& folder, const std::string& name) {
  const std::string path = folder + "/" + name;
  std::error_code failure;
  const fs::file_status status = fs::symlink_status(path, failure);
  if (status.type() == fs::file_type::none) {
    throw Error(ErrorKind::kIo, "cannot examine file", path, failure.message());
  }
  return fs::exists(status);
}

std::string folder_text(const std::string& folder, const std::string& name, size_t max_bytes) {
  if (!in_folder(folder, name)) return "";
  check_link(folder, name);
  return read_text_file(folder + "/" + name, max_bytes);
}

void explain_missing(const std::string& folder, const std::string& missing) {
  if (in_folder(folder, "model.safetensors") || in_folder(folder, "model.safetensors.index.json")) {
    return;
  }
  if (has_adapter(folder)) {
    throw Error(ErrorKind::kBadData, "not a whole model", folder,
                "it is a LoRA adapter" + adapter_base(folder) + ", and " + missing,
                "merge it into its base model and save that (peft: merge_and_unload)");
  }
  std::vector<std::string> others;
  std::string formats;
  for (const std::string& name : names_in(folder)) {
    const std::string format = weight_format(name);
    if (format.empty()) continue;
    others.push_back(name);
    formats = format;
  }
  if (others.empty()) return;
  throw Error(ErrorKind::kBadData, "no weights that can be read", folder,
              missing + "; there is " + listed(others) + " (" + formats + ")",
              formats == "safetensors"
                  ? "name a single file model.safetensors, or add the index of the shards"
                  : "convert it to a Hugging Face folder with safetensors "
                    "(transformers: save_pretrained)");
}

std::vector<std::string> unread_files(const std::string& folder,
                                      const std::vector<std::string>& weights) {
  std::vector<std::string> unread, notes;
  for (const std::string& name : names_in(folder)) {
    const bool read = std::find(weights.begin(), weights.end(), name) != weights.end();
    if (!read && !weight_format(name).empty()) unread.push_back(name);
  }
  if (!unread.empty()) {
    notes.push_back(listed(unread) + " not read: the weights are those of " + listed(weights));
  }
  if (has_adapter(folder)) {
    notes.push_back("the LoRA adapter beside the weights is not applied (adapter_config.json)");
  }
  return notes;
}

}  // namespace tq
