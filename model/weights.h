// weights - an immutable model in host memory: what a backend is given to run.
//
// Every number that the forward pass needs is here, in the canonical row-major layout of the .tq
// file (docs/format.md). Two sources fill it: model/hf_folder.h (unquantized) and model/tq_file.h.
// A backend may repack at load (model/backend.h); nothing here changes after load.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model/act_codes.h"
#include "model/config.h"
#include "model/json.h"
#include "model/tensor.h"

namespace tq {

/// How a matrix is stored. Packed kinds hold integer codes in groups along a row, one f16 scale
/// per group: value = scale * code.
enum class Storage : uint8_t {
  kF32,
  kF16,
  kBF16,
  kQ4,  // codes -8..7 stored as code + 8, two per byte, even column in the low nibble
  kQ8   // codes -127..127, one int8 each
};

/// A matrix [rows, cols], row-major; as a linear map it is [out, in]. Views only.
struct Matrix {
  Storage storage = Storage::kF32;
  int64_t rows = 0, cols = 0;
  int64_t group = 0;                 // packed: columns per scale; the last group may be short
  const std::byte* data = nullptr;   // dense elements or codes, row_bytes() per row
  const uint16_t* scales = nullptr;  // packed: f16 [rows, n_groups()]

  bool packed() const { return storage == Storage::kQ4 || storage == Storage::kQ8; }
  int64_t n_groups() const { return group ? (cols + group - 1) / group : 0; }
  int64_t row_bytes() const;  // kQ4: ceil(cols / 2)
  size_t data_bytes() const { return static_cast<size_t>(rows * row_bytes()); }
  size_t scale_bytes() const { return static_cast<size_t>(rows * n_groups() * 2); }
  size_t n_bytes() const { return data_bytes() + scale_bytes(); }
};

/// Code of one element of a packed matrix (kQ4: -8..7, kQ8: -127..127).
int packed_code(const Matrix& matrix, int64_t row, int64_t col);
/// One row as f32 (dense: converted, packed: scale * code). `out` has matrix.cols elements.
void matrix_row_f32(const Matrix& matrix, int64_t row, float* out);

/// Throws kBadData with count and first index if an element is NaN or infinite.
void check_finite(const Matrix& matrix, const std::string& name, const std::string& where);

/// How far a square dense matrix M [n, n] is from orthogonal: the largest of a few estimates of
/// |M^T M - I|_F / sqrt(n), each |(M^T M - I) z| / |z| for a fixed vector z of random signs (its
/// mean square is exactly that). Infinite or NaN elements give infinity or NaN.
double orthogonality_error(const Matrix& matrix);

/// An orthogonal change of basis applied to row vectors. Hadamard: y = (x * diag(signs)) * H /
/// sqrt(block), block by block; H is the matrix of model/hadamard.h. Dense: y = x M; only the
/// residual basis may be dense (the input of a linear is transformed at every call).
struct Transform {
  enum class Kind : uint8_t { kNone, kHadamard, kDense };
  Kind kind = Kind::kNone;
  int64_t size = 0;               // length of the vector
  int64_t block = 0;              // Hadamard order; divides size (equal to it if it exists)
  const int8_t* signs = nullptr;  // [size] of +1 / -1, or null for all +1
  Matrix matrix = {};             // M [size, size], dense storage
  bool active() const { return kind != Kind::kNone; }
};

/// Exponents whose power of two is a normal f32.
constexpr int kMinExponent = -126, kMaxExponent = 127;

/// How the input of a linear is rounded at run time, per token and group of columns: to scale *
/// code. bits = 16 means not rounded (f32 is used).
struct ActQuant {
  int bits = 16;  // 3, 4, 8 or 16
  int64_t group =
      64;  // columns per scale, a multiple of 32 or whole rows; need not be the weight's
  float clip = 1.0f;
  ActCodes codes = ActCodes::kSymmetric;
  // 3 and 4 bits: the scales of a token are whole multiples, 1 to kMostMultiple, of one of its own;
  // 8 bits: it has one scale. Either way scale * code is one number of the token times an integer
  // of a byte.
  bool two_level = false;
  /// How x' A^T is rounded for a packed B [out, rank] with groups of `group` columns: clip belongs
  /// to x.
  ActQuant narrow(int64_t rank, int64_t group) const;
  bool operator==(const ActQuant&) const = default;
};

/// y[n, out] = (x' R^T (+ (x' A^T) B^T)) diag(2^exponents), where x' = round(transform(x)).
struct Linear {
  Matrix weight;                   // W [out, in], or the residual R when a branch exists
  std::optional<Matrix> branch_a;  // A [rank, in], "down"
  std::optional<Matrix> branch_b;  // B [out, rank], "up"
  Transform input;                 // online transform of x
  ActQuant act;                    // rounding of x (both components read the rounded x when
                                   // the branch is packed; a dense branch reads x unrounded)
  // [out], kMinExponent .. kMaxExponent: the power of two that was taken out of each row, because
  // f16 scales could not hold it; null: none, as in all ordinary models.
  const int8_t* exponents = nullptr;
  int64_t out_dim() const { return weight.rows; }
  int64_t in_dim() const { return weight.cols; }
  int64_t rank() const { return branch_a ? branch_a->rows : 0; }
  size_t n_bytes() const;  // weight, branch and exponents
};

/// A step of the residual stream: x <- x + (x A^T) B^T, nothing rounded. Where each block has a
/// residual basis of its own, it leads from one basis to the next (ReSpinQuant).
struct LowRankStep {
  Matrix a;  // A [rank, dim], any storage
  Matrix b;  // B [dim, rank]
};

/// One decoder layer. Norm gains are f32; q_norm and k_norm are empty for Llama.
struct Layer {
  std::vector<float> attn_norm, ffn_norm;  // [dim]
  std::vector<float> q_norm, k_norm;       // [head_dim]
  Linear wq, wk, wv, wo, w_gate, w_up, w_down;
  // Taken just before the output of the attention, of the FFN is added to the stream.
  std::optional<LowRankStep> attn_skip, ffn_skip;
};

/// The seven linears of a layer with their names, in file order.
struct NamedLinear {
  const char* name;
  Linear Layer::*member;
};
extern const NamedLinear kLayerLinears[7];
struct NamedSkip {
  const char* name;
  std::optional<LowRankStep> Layer::*member;
};
extern const NamedSkip kLayerSkips[2];

/// What changes of basis cost beside the linears, in bytes of the file: the signs or the matrix of
/// a transform; the skips of a layer.
size_t transform_bytes(const Transform& transform);
size_t skip_bytes(const Layer& layer);

/// Texts of the Hugging Face folder that travel with the weights, byte for byte; empty if absent.
struct ModelTexts {
  std::string config, tokenizer, tokenizer_config, generation_config, chat_template;
};

struct Model {
  Config config;
  ModelTexts texts;
  Json quantization;  // how it was made ({"method": "none"} for a folder)
  Matrix tok_embed;   // [vocab, dim], always in the model's own basis
  Linear lm_head;     // weight is a view of tok_embed when tied
  // The residual stream runs in a rotated basis when active: x = transform(embed[token]), and the
  // inverse is applied before final_norm. Embedding and head therefore keep their own values, tied
  // or not, and the norm gain needs no folding. Where low-rank steps have led the stream to another
  // basis behind the last layer, output_basis is that one.
  Transform residual_basis, output_basis;
  const Transform& last_basis() const {
    return output_basis.active() ? output_basis : residual_basis;
  }
  std::vector<float> final_norm;  // [dim]
  std::vector<Layer> layers;
  int kv_bits = 16;                // of the KV cache, as the file asks: 16, 8 or 4
  std::string source;              // path, for messages
  std::vector<std::string> notes;  // what a user should know about the source, a sentence each
  std::shared_ptr<void> owner;     // keeps mappings and buffers of the views alive
  // Drops the resident pages of a matrix that will not be read soon (they come back when touched);
  // null, or no effect, where the matrix is not part of a mapped file.
  std::function<void(const Matrix&)> release;
  // Throws kIo if the files behind the views were written to since they were opened; may be null.
  std::function<void()> check_unchanged;
};

/// How much of a .tq file is read when it is opened: every byte, against its checksum; or only the
/// texts, for who does not run it.
enum class Verify { kAll, kTexts };

/// Loads a model folder (config.json, safetensors, tokenizer files) without quantizing it.
/// Views point into the mapped shards. Throws Error. (hf_folder.cpp)
Model load_hf_folder(const std::string& folder);
/// Opens a .tq file. Prologue, header, lengths and texts are always checked. (tq_reader.cpp)
Model load_tq_file(const std::string& path, Verify verify = Verify::kAll);
/// A folder or a .tq file, whichever `path` is; the error for anything else says what it looks
/// like.
Model load_model(const std::string& path, Verify verify = Verify::kAll);

}  // namespace tq
