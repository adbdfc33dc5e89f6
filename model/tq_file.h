// tq_file - the .tq container: writer, reader, checksums. Layout: docs/format.md.
//
// A fixed 64-byte prologue, tensors aligned to 64 bytes in the order written, and a JSON header at
// the end of the file. The prologue is written last, so an interrupted copy is recognised.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "model/atomic_file.h"
#include "model/json.h"
#include "model/weights.h"

namespace tq {

constexpr uint32_t kTqFormatVersion = 5;  // the newest; all versions from 1 on are read

/// True if the file starts with the .tq magic.
bool looks_like_tq(const std::string& path);

/// Writes `path` through a temporary file beside it; nothing appears under `path` until finish().
/// The destructor removes the temporary file of an unfinished write. Throws kIo.
class TqWriter {
 public:
  explicit TqWriter(const std::string& path, Replace replace = Replace::kAllowed);

  /// Appends named bytes, 64-byte aligned, with their checksum. Names must be unique.
  void add(const std::string& name, const std::string& dtype, const std::vector<int64_t>& shape,
           std::span<const std::byte> data);
  void add_f32(const std::string& name, std::span<const float> values);
  /// Data of a matrix: NAME (codes or elements) and, if packed, NAME.scales (f16).
  void add_matrix(const std::string& name, const Matrix& matrix);
  /// The token embedding, "tok_embed".
  void add_table(const Matrix& table);
  /// All matrices of a linear (NAME, NAME.branch_a, NAME.branch_b), and the description of its
  /// input transform and rounding in the header. With `tied`, the weight is the matrix written
  /// before by add_table() and only described.
  void add_linear(const std::string& name, const Linear& linear, bool tied = false);
  /// The basis of the residual stream (Model::residual_basis); leave out when inactive.
  void add_residual_basis(const Transform& transform);
  /// The basis behind the last layer (Model::output_basis), where it is another one.
  void add_output_basis(const Transform& transform);
  /// A step of the residual stream, "layers.N.attn_skip" or "layers.N.ffn_skip".
  void add_skip(const std::string& name, const LowRankStep& skip);
  /// The width of the KV cache that the model is meant for: 16, 8 or 4.
  void set_kv_bits(int bits) { kv_bits_ = bits; }
  /// Writes header and prologue, fsyncs, renames. `quantization` is stored for inspection. `check`
  /// sees the complete file under its temporary name; what it throws keeps the file from appearing.
  void finish(const ModelTexts& texts, const Json& quantization,
              const std::function<void(const std::string& path)>& check = nullptr);
  uint64_t bytes_written() const { return file_.size(); }

 private:
  void pad_to_alignment();
  Json describe_transform(const std::string& name, const Transform& transform);
  AtomicFile file_;
  Json tensors_ = Json::array();
  Json linears_ = Json::object();
  Json skips_;
  Json residual_basis_, output_basis_;
  int kv_bits_ = 16;
  uint32_t version_ = 2;  // the oldest that has all that was added
};

/// Opens a .tq file with every byte checked, and returns the number of its tensors. Throws kBadData
/// naming the tensor.
int64_t verify_tq_file(const std::string& path);

}  // namespace tq
