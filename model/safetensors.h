// safetensors - Hugging Face's weight container, single file or sharded, read-only and mapped.
//
// The header is untrusted: every rule of the reference reader is checked before anything is used
// (docs/format.md is about .tq; the safetensors rules are listed in safetensors.cpp).
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "model/input_file.h"
#include "model/tensor.h"

namespace tq {

/// One .safetensors file. Tensor views point into the mapping and live as long as this object.
class SafetensorsFile {
 public:
  /// Maps and validates. Throws kIo (cannot open) or kBadData (what is wrong, with numbers).
  explicit SafetensorsFile(const std::string& path);
  /// Tensors of dtype F32, F16, BF16. Others in the file are listed in `other_dtypes`.
  const std::map<std::string, TensorView>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& other_dtypes() const { return other_dtypes_; }
  const MappedFile& file() const { return file_; }
  uint64_t data_bytes() const { return data_bytes_; }  // of all tensors

 private:
  MappedFile file_;
  uint64_t data_bytes_ = 0;
  std::map<std::string, TensorView> tensors_;
  std::map<std::string, std::string> other_dtypes_;  // tensor name -> dtype we cannot use
};

/// All shards of a model folder: model.safetensors, or those of model.safetensors.index.json.
class SafetensorsFolder {
 public:
  explicit SafetensorsFolder(const std::string& folder);
  bool contains(const std::string& name) const;
  /// View of a weight; throws kBadData when absent, of another shape, or of an unusable dtype.
  TensorView get(const std::string& name, const std::vector<int64_t>& shape) const;
  std::vector<std::string> names() const;
  std::vector<std::string> paths() const;  // shard files
  /// A sentence for each kind of weights that lie beside these and are not read.
  std::vector<std::string> unread() const;
  /// Throws kIo if a shard was written to since it was opened.
  void check_unchanged() const;
  uint64_t n_bytes() const;  // of all tensors
  /// Drops the resident pages of a span of a shard (used layer by layer while quantizing); no
  /// effect on other memory.
  void release(const std::byte* begin, size_t bytes) const;

 private:
  std::string folder_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, size_t> file_of_tensor_;
};

}  // namespace tq
