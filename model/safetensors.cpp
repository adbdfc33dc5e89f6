// safetensors - see safetensors.h.
//
// The rules checked, in order (those of the reference reader, plus duplicate names):
//   1 the file holds the 8-byte header length N; N <= 100 MB; 8 + N fits the file
//   2 the header is a JSON object in UTF-8 (whitespace around it is allowed)
//   3 no key appears twice     4 __metadata__ maps strings to strings
//   5 every tensor has a known dtype, a shape of non-negative integers, two offsets
//   6 sorted by offset, tensors are contiguous from 0: no hole, no overlap
//   7 element count and bits do not overflow     8 the last tensor ends where the file ends
//   9 a dimension 0 and a scalar are legal      10 bytes == shape x dtype
// NaN and infinity are not the format's business: check_finite() in weights.h.
#include "model/safetensors.h"

#include <algorithm>
#include <deque>
#include <filesystem>
#include <set>

#include "model/error.h"
#include "model/folder_files.h"
#include "model/json.h"

namespace tq {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr const char* kIndexName = "model.safetensors.index.json";
constexpr size_t kMaxIndexBytes = 32'000'000;  // ten times that of the largest model known

Error bad(const std::string& path, const std::string& why, const std::string& hint = "") {
  return Error(ErrorKind::kBadData, "bad safetensors file", path, why, hint);
}

// Name and bits per element of every dtype the format knows; null for an unknown one.
const std::pair<const std::string, uint64_t>* find_dtype(const std::string& dtype) {
  static const std::map<std::string, uint64_t> bits = {
      {"BOOL", 8}, {"F4", 4},          {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
      {"I8", 8},   {"F8_E5M2", 8},     {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
      {"I16", 16}, {"F8_E5M2FNUZ", 8}, {"U16", 16},    {"F16", 16},    {"BF16", 16},
      {"I32", 32}, {"U32", 32},        {"F32", 32},    {"C64", 64},    {"F64", 64},
      {"I64", 64}, {"U64", 64}};
  const auto it = bits.find(dtype);
  return it == bits.end() ? nullptr : &*it;
}

struct Entry {
  std::string name;
  std::string_view dtype;
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;
};

uint64_t unsigned_value(const Json& json, const std::string& path, const std::string& what) {
  if (!json.is_number_unsigned()) {
    const std::string text = json.is_structured() ? "not a number" : json.dump().substr(0, 40);
    throw bad(path, what + " is " + text + ", expected a whole number >= 0");
  }
  return json.get<uint64_t>();
}

Entry parse_entry(const std::string& path, const std::string& name, const Json& json) {
  const std::string tensor = "tensor " + name;
  Entry entry;
  entry.name = name;
  if (!json.is_object()) throw bad(path, tensor + " is not described by an object");
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!json.contains(key)) throw bad(path, tensor + ": " + key + " is missing");
  }
  if (!json["dtype"].is_string()) throw bad(path, tensor + ": dtype is not a string");
  const std::string dtype = json["dtype"].get<std::string>();
  const auto* known = find_dtype(dtype);
  if (!known) throw bad(path, tensor + ": unknown dtype " + dtype);
  entry.dtype = known->first;

  for (const auto& [key, value] : json.items()) {
    if (key != "dtype" && key != "shape" && key != "data_offsets") {
      throw bad(path, tensor + ": unknown field " + key);
    }
  }

  if (!json["shape"].is_array()) throw bad(path, tensor + ": shape is not an array");
  // Multiplied in order and within int64, as TensorView::n_elements() will: a product is zero only
  // if a dimension is, never because it wrapped.
  int64_t count = 1;
  bool overflow = false;
  for (const Json& size : json["shape"]) {
    const uint64_t value = unsigned_value(size, path, tensor + ": a dimension");
    overflow = overflow || value > static_cast<uint64_t>(INT64_MAX) ||
               __builtin_mul_overflow(count, static_cast<int64_t>(value), &count);
    entry.shape.push_back(static_cast<int64_t>(value));
  }
  uint64_t total_bits = 0;
  if (overflow ||
      __builtin_mul_overflow(static_cast<uint64_t>(count), known->second, &total_bits)) {
    throw bad(path, tensor + ": the size of its shape overflows 64 bits");
  }
  if (total_bits % 8 != 0) throw bad(path, tensor + ": its size is not a whole number of bytes");

  const Json& offsets = json["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2) {
    throw bad(path, tensor + ": data_offsets is not a pair");
  }
  entry.begin = unsigned_value(offsets[0], path, tensor + ": an offset");
  entry.end = unsigned_value(offsets[1], path, tensor + ": an offset");
  if (entry.begin > entry.end) {
    throw bad(path, tensor + ": data_offsets " + std::to_string(entry.begin) + " > " +
                        std::to_string(entry.end));
  }
  if (entry.end - entry.begin != total_bits / 8) {
    throw bad(path, tensor + ": data_offsets span " + std::to_string(entry.end - entry.begin) +
                        " bytes, shape and dtype need " + std::to_string(total_bits / 8));
  }
  return entry;
}

void check_contiguous(const std::string& path, const std::deque<Entry>& entries,
                      uint64_t data_bytes) {
  uint64_t end = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != end) {
      throw bad(path, "tensor " + entry.name + " begins at " + std::to_string(entry.begin) +
                          ", expected " + std::to_string(end) +
                          (entry.begin < end ? " (overlap)" : " (hole)"));
    }
    end = entry.end;
  }
  if (end != data_bytes) {
    throw bad(path,
              "the file has " + std::to_string(data_bytes) +
                  " bytes of data, its header describes " + std::to_string(end),
              data_bytes < end ? "incomplete download?" : "");
  }
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(path) {
  if (file_.size() < 8) {
    throw bad(path,
              "the file has " + std::to_string(file_.size()) + " bytes, too small for a header",
              "incomplete download?");
  }
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; --i) {
    header_bytes = header_bytes << 8 | static_cast<uint64_t>(file_.data()[i]);
  }
  if (header_bytes == 0) throw bad(path, "the header is empty");
  if (header_bytes > kMaxHeaderBytes) {
    throw bad(path, "a header of " + std::to_string(header_bytes) + " bytes, at most " +
                        std::to_string(kMaxHeaderBytes) + " are allowed");
  }
  if (header_bytes > file_.size() - 8) {
    throw bad(path,
              "a header of " + std::to_string(header_bytes) + " bytes in a file of " +
                  std::to_string(file_.size()),
              "incomplete download?");
  }
  const std::string_view text(reinterpret_cast<const char*>(file_.data() + 8), header_bytes);
  // A deque, and one entry at a time: a header of 100 MB describes a million tensors.
  std::deque<Entry> entries;
  const JsonStream metadata{{"__metadata__"}, [&](const std::string& key, Json&& value) {
                              if (!value.is_string()) {
                                throw bad(path, "__metadata__." + key + " is not a string");
                              }
                            }};
  const JsonStream tensors{{}, [&](const std::string& name, Json&& value) {
                             if (name != "__metadata__") {
                               entries.push_back(parse_entry(path, name, value));
                             } else if (!value.is_object()) {
                               throw bad(path, "__metadata__ is not an object");
                             }
                           }};
  if (!parse_json(text, path + " header", {metadata, tensors}).is_object()) {
    throw bad(path, "the header is not a JSON object");
  }
  // Empty tensors share their offset with a neighbour, so the end decides.
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  data_bytes_ = file_.size() - 8 - header_bytes;
  check_contiguous(path, entries, data_bytes_);
  const std::byte* data = file_.data() + 8 + header_bytes;
  for (Entry& entry : entries) {
    const DType dtype = entry.dtype == "F32"    ? DType::kF32
                        : entry.dtype == "F16"  ? DType::kF16
                        : entry.dtype == "BF16" ? DType::kBF16
                                                : DType::kU8;
    if (dtype == DType::kU8) {
      other_dtypes_.emplace(std::move(entry.name), entry.dtype);
    } else {
      tensors_.emplace(std::move(entry.name),
                       TensorView{dtype, std::move(entry.shape), data + entry.begin});
    }
  }
}

namespace {

// Shard files by the index, with every tensor's shard.
std::map<std::string, std::string> read_index(const std::string& folder) {
  const std::string path = folder + "/" + kIndexName;
  std::map<std::string, std::string> shard_of;
  const JsonStream map{{"weight_map"}, [&](const std::string& tensor, Json&& value) {
                         if (!value.is_string()) {
                           throw bad(path, tensor + ": shard name is not a string");
                         }
                         const std::string name = value.get<std::string>();
                         if (name.empty() || name.find_first_of("/\\") != std::string::npos ||
                             name == "." || name == ".." || name.find('\0') != std::string::npos) {
                           throw bad(path,
                                     tensor + ": shard \"" + name + "\" is not a plain file name");
                         }
                         shard_of[tensor] = name;
                       }};
  const Json index = parse_json(folder_text(folder, kIndexName, kMaxIndexBytes), path, {map});
  if (!require(index, "weight_map", path).is_object() || shard_of.empty()) {
    throw bad(path, "weight_map is not an object with entries");
  }
  return shard_of;
}

}  // namespace

SafetensorsFolder::SafetensorsFolder(const std::string& folder) : folder_(folder) {
  namespace fs = std::filesystem;
  const std::string single = folder + "/model.safetensors";
  std::map<std::string, std::string> shard_of;
  std::set<std::string> shards;
  std::error_code ignored;
  if (in_folder(folder, kIndexName)) {
    shard_of = read_index(folder);
    for (const auto& [tensor, shard] : shard_of) shards.insert(shard);
    if (fs::exists(single, ignored) && !shards.count("model.safetensors")) {
      throw Error(ErrorKind::kBadData, "two sets of weights", folder,
                  "model.safetensors and model.safetensors.index.json are both there",
                  "remove the one that is not meant");
    }
  } else if (fs::exists(single, ignored)) {
    shards.insert("model.safetensors");
  } else {
    explain_missing(folder, "neither model.safetensors nor its index is there");
    throw Error(ErrorKind::kBadData, "no weights", folder,
                "neither model.safetensors nor model.safetensors.index.json is there",
                "tq reads safetensors only, no .bin or .pth files");
  }
  std::string missing;
  for (const std::string& shard : shards) {
    if (!fs::exists(folder + "/" + shard, ignored)) {
      missing += (missing.empty() ? "" : ", ") + shard;
    }
  }
  if (!missing.empty()) {
    throw Error(ErrorKind::kBadData, "shards are missing", folder, missing, "download them again");
  }
  for (const std::string& shard : shards) {
    const size_t file_index = files_.size();
    files_.push_back(std::make_unique<SafetensorsFile>(folder + "/" + shard));
    std::vector<std::string> names;
    for (const auto& item : files_.back()->tensors()) names.push_back(item.first);
    for (const auto& item : files_.back()->other_dtypes()) names.push_back(item.first);
    for (const std::string& name : names) {
      const auto [it, added] = file_of_tensor_.emplace(name, file_index);
      if (!added) {
        throw bad(folder, "tensor " + name + " is in " + files_[it->second]->file().path() +
                              " and in " + files_[file_index]->file().path());
      }
      if (!shard_of.empty() && shard_of.count(name) && shard_of[name] != shard) {
        throw bad(folder,
                  "tensor " + name + " is in " + shard + ", the index says " + shard_of[name]);
      }
    }
  }
  for (const auto& [tensor, shard] : shard_of) {
    if (!file_of_tensor_.count(tensor)) {
      throw bad(folder, "tensor " + tensor + " is not in " + shard + ", where the index puts it");
    }
  }
}

bool SafetensorsFolder::contains(const std::string& name) const {
  return file_of_tensor_.count(name) > 0;
}

TensorView SafetensorsFolder::get(const std::string& name,
                                  const std::vector<int64_t>& shape) const {
  const auto it = file_of_tensor_.find(name);
  if (it == file_of_tensor_.end()) {
    throw Error(ErrorKind::kBadData, "weight is missing", folder_, name);
  }
  const SafetensorsFile& file = *files_[it->second];
  const auto other = file.other_dtypes().find(name);
  if (other != file.other_dtypes().end()) {
    throw Error(ErrorKind::kBadData, "weight dtype not supported", file.file().path(),
                name + " is " + other->second, "expected F32, F16 or BF16");
  }
  const TensorView& view = file.tensors().at(name);
  if (view.shape != shape) {
    const auto text = [](const std::vector<int64_t>& sizes) {
      std::string out = "[";
      for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
      return out + "]";
    };
    throw Error(ErrorKind::kBadData, "weight has the wrong shape", file.file().path(),
                name + " is " + text(view.shape) + ", config.json asks for " + text(shape));
  }
  return view;
}

std::vector<std::string> SafetensorsFolder::names() const {
  std::vector<std::string> names;
  for (const auto& item : file_of_tensor_) names.push_back(item.first);
  return names;
}

std::vector<std::string> SafetensorsFolder::paths() const {
  std::vector<std::string> paths;
  for (const auto& file : files_) paths.push_back(file->file().path());
  return paths;
}

std::vector<std::string> SafetensorsFolder::unread() const {
  std::vector<std::string> read;
  for (const std::string& path : paths()) {
    read.push_back(std::filesystem::path(path).filename().string());
  }
  return unread_files(folder_, read);
}

void SafetensorsFolder::check_unchanged() const {
  for (const auto& file : files_) file->file().check_unchanged();
}

uint64_t SafetensorsFolder::n_bytes() const {
  uint64_t bytes = 0;
  for (const auto& file : files_) bytes += file->data_bytes();
  return bytes;
}

void SafetensorsFolder::release(const std::byte* begin, size_t bytes) const {
  for (const auto& file : files_) {
    const std::byte* first = file->file().data();
    if (begin >= first && begin < first + file->file().size()) {
      file->file().release(begin, bytes);
      return;
    }
  }
}

}  // namespace tq
