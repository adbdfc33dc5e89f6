// tq_reader - opening a .tq file as a Model. Everything in it is untrusted until checked here.
//
// The writer is tq_file.cpp; the layout is docs/format.md.
#include <xxhash.h>

#include <cmath>
#include <cstdio>
#include <map>
#include <set>

#include "model/error.h"
#include "model/hadamard.h"
#include "model/tq_file.h"
#include "model/tq_layout.h"

namespace tq {
namespace {

constexpr int64_t kMaxDim = int64_t{1} << 32;  // keeps every product of two sizes in 64 bits

Error bad(const std::string& path, const std::string& why, const std::string& hint = "") {
  return Error(ErrorKind::kBadData, "not a usable .tq file", path, why, hint);
}

uint64_t element_bits(const std::string& dtype) {
  static const std::map<std::string, uint64_t> bits = {
      {"F32", 32}, {"F16", 16}, {"BF16", 16}, {"U8", 8}, {"I8", 8}, {"Q8", 8}, {"Q4", 4}};
  const auto it = bits.find(dtype);
  return it == bits.end() ? 0 : it->second;
}

// Rows of Q4 codes start on a byte, so sizes are counted per row of the last dimension.
uint64_t expected_bytes(const std::string& path, const TqTensor& tensor) {
  uint64_t rows = 1;
  for (size_t i = 0; i + 1 < tensor.shape.size(); ++i) {
    if (__builtin_mul_overflow(rows, static_cast<uint64_t>(tensor.shape[i]), &rows)) {
      throw bad(path, "tensor " + tensor.name + ": size overflows");
    }
  }
  const uint64_t cols = tensor.shape.empty() ? 1 : static_cast<uint64_t>(tensor.shape.back());
  uint64_t bytes = (cols * element_bits(tensor.dtype) + 7) / 8;
  if (__builtin_mul_overflow(rows, bytes, &bytes)) {
    throw bad(path, "tensor " + tensor.name + ": size overflows");
  }
  return bytes;
}

TqTensor parse_tensor(const std::string& path, const Json& json) {
  TqTensor tensor;
  tensor.name = require_string(json, "name", path);
  tensor.dtype = require_string(json, "dtype", path);
  if (element_bits(tensor.dtype) == 0) {
    throw bad(path, "tensor " + tensor.name + ": unknown dtype " + tensor.dtype);
  }
  const Json& shape = require(json, "shape", path);
  if (!shape.is_array() || shape.size() > 4) {
    throw bad(path, "tensor " + tensor.name + ": shape is not a short array");
  }
  for (const Json& size : shape) {
    if (!size.is_number_unsigned() || size.get<uint64_t>() > static_cast<uint64_t>(kMaxDim)) {
      throw bad(path, "tensor " + tensor.name + ": bad shape");
    }
    tensor.shape.push_back(size.get<int64_t>());
  }
  tensor.offset = static_cast<uint64_t>(require_int(json, "offset", 0, INT64_MAX, path));
  tensor.bytes = static_cast<uint64_t>(require_int(json, "bytes", 0, INT64_MAX, path));
  tensor.hash = require_string(json, "xxh3", path);
  if (json.size() != 6)
    throw bad(path, "tensor " + tensor.name + ": unknown field", "use a newer tq");
  return tensor;
}

void check_prologue(const MappedFile& file, const TqPrologue& prologue) {
  const std::string& path = file.path();
  if (std::memcmp(prologue.magic, kTqMagic, sizeof kTqMagic) != 0) {
    throw bad(path, "it does not start with the .tq magic", "make one with: tq quantize HF_DIR");
  }
  if (prologue.byte_order != kTqByteOrder) throw bad(path, "wrong byte order");
  if (prologue.version < 1 || prologue.version > kTqFormatVersion) {
    throw bad(path,
              "format version " + std::to_string(prologue.version) +
                  ", this tq reads versions 1 to " + std::to_string(kTqFormatVersion),
              prologue.version > kTqFormatVersion ? "use a newer tq" : "quantize the model again");
  }
  if (prologue.prologue_hash != XXH3_64bits(&prologue, offsetof(TqPrologue, prologue_hash))) {
    throw bad(path, "checksum of the prologue does not match", "copy the file again");
  }
  if (prologue.file_bytes != file.size()) {
    throw bad(path,
              "the file has " + std::to_string(file.size()) + " bytes, expected " +
                  std::to_string(prologue.file_bytes),
              "incomplete copy?");
  }
  if (prologue.header_bytes > kTqMaxHeaderBytes || prologue.header_offset > prologue.file_bytes ||
      prologue.header_offset % kTqAlignment != 0 || prologue.reserved != 0 ||
      prologue.file_bytes - prologue.header_offset != prologue.header_bytes) {
    throw bad(path, "the prologue's sizes contradict each other");
  }
}

// Builds a Model from a validated layout: every matrix is looked up with the shape that the config
// asks for, so a file whose parts disagree is refused before anything runs.
class Reader {
 public:
  Reader(const MappedFile& file, const TqLayout& layout)
      : file_(file), path_(file.path()), header_(layout.header) {
    for (const TqTensor& tensor : layout.tensors) {
      if (!tensors_.emplace(tensor.name, &tensor).second) {
        throw bad(path_, "tensor " + tensor.name + " appears twice");
      }
    }
  }

  Model read() {
    Model model;
    for (const NamedText& text : kModelTexts) {
      const TqTensor* tensor = find(std::string("text.") + text.name);
      if (!tensor) continue;
      model.texts.*text.member =
          std::string(reinterpret_cast<const char*>(file_.data() + tensor->offset), tensor->bytes);
    }
    if (model.texts.config.empty()) throw bad(path_, "text.config is missing");
    if (model.texts.tokenizer.empty()) throw bad(path_, "text.tokenizer is missing");
    model.config = parse_config(model.texts.config, path_ + ": config.json");
    model.quantization = require(header_, "quantization", path_);
    if (!model.quantization.is_object()) throw bad(path_, "quantization is not an object");
    require_string(model.quantization, "method", path_);
    const Config& c = model.config;
    check_header(c);

    const Json& head = linear_json("lm_head");
    const Json& head_weight = require(head, "weight", path_);
    const std::string head_tensor = require_string(head_weight, "tensor", path_);
    if (c.tied != (head_tensor == "tok_embed")) {
      throw bad(path_, "lm_head and the config disagree on tied embeddings");
    }
    model.tok_embed = matrix(require(linear_json("tok_embed"), "weight", path_), "tok_embed",
                             c.vocab_size, c.dim);
    model.lm_head = linear("lm_head", c.vocab_size, c.dim);
    if (header_.contains("residual_basis")) {
      model.residual_basis = stream_basis("residual_basis", c.dim);
    }
    if (header_.contains("output_basis")) {
      if (!model.residual_basis.active()) throw bad(path_, "output_basis without residual_basis");
      model.output_basis = stream_basis("output_basis", c.dim);
    }
    if (header_.contains("kv")) model.kv_bits = kv_bits(header_["kv"]);
    model.final_norm = vector("final_norm", c.dim);
    for (int64_t i = 0; i < c.n_layers; ++i) model.layers.push_back(layer(c, i));
    for (const auto& [name, tensor] : tensors_) {
      if (!used_.count(name)) throw bad(path_, "tensor " + name + " belongs to nothing");
    }
    return model;
  }

 private:
  Layer layer(const Config& c, int64_t index) {
    const std::string prefix = "layers." + std::to_string(index) + ".";
    Layer layer;
    layer.attn_norm = vector(prefix + "attn_norm", c.dim);
    layer.ffn_norm = vector(prefix + "ffn_norm", c.dim);
    if (c.has_qk_norm()) {
      layer.q_norm = vector(prefix + "q_norm", c.head_dim);
      layer.k_norm = vector(prefix + "k_norm", c.head_dim);
    }
    layer.wq = linear(prefix + "wq", c.q_dim(), c.dim);
    layer.wk = linear(prefix + "wk", c.kv_dim(), c.dim);
    layer.wv = linear(prefix + "wv", c.kv_dim(), c.dim);
    layer.wo = linear(prefix + "wo", c.dim, c.q_dim());
    layer.w_gate = linear(prefix + "w_gate", c.hidden_dim, c.dim);
    layer.w_up = linear(prefix + "w_up", c.hidden_dim, c.dim);
    layer.w_down = linear(prefix + "w_down", c.dim, c.hidden_dim);
    // One rounding of x feeds all linears of a site; a file that says otherwise cannot be run.
    same_input(prefix + "wk", layer.wq, layer.wk);
    same_input(prefix + "wv", layer.wq, layer.wv);
    same_input(prefix + "w_up", layer.w_gate, layer.w_up);
    for (const NamedSkip& named : kLayerSkips) {
      layer.*named.member = skip(prefix + named.name, c.dim);
    }
    return layer;
  }

  // Names that nothing below would ask for; those inside are checked where they are read.
  void check_header(const Config& c) {
    only_keys(header_, "the header",
              {"tq_format", "quantization", "residual_basis", "output_basis", "linears", "skips",
               "kv", "tensors"});
    std::set<std::string> linears = {"tok_embed", "lm_head"};
    for (int64_t i = 0; i < c.n_layers; ++i) {
      for (const NamedLinear& named : kLayerLinears) {
        linears.insert("layers." + std::to_string(i) + "." + named.name);
      }
    }
    only_keys(require(header_, "linears", path_), "linears", linears);
    only_keys(linear_json("tok_embed"), "tok_embed", {"weight"});
    if (!header_.contains("skips")) return;
    std::set<std::string> names;
    for (int64_t i = 0; i < c.n_layers; ++i) {
      for (const NamedSkip& named : kLayerSkips) {
        names.insert("layers." + std::to_string(i) + "." + named.name);
      }
    }
    only_keys(header_["skips"], "skips", names);
  }

  int kv_bits(const Json& json) {
    only_keys(json, "kv", {"bits"});
    const int64_t bits = require_int(json, "bits", 4, 16, path_);
    if (bits != 4 && bits != 8 && bits != 16) {
      throw bad(path_, "kv: a cache of " + std::to_string(bits) + " bits is not supported");
    }
    return static_cast<int>(bits);
  }

  std::optional<LowRankStep> skip(const std::string& name, int64_t dim) {
    if (!header_.contains("skips") || !header_["skips"].contains(name)) return std::nullopt;
    const Json& json = header_["skips"][name];
    only_keys(json, name, {"a", "b"});
    const Json& a = require(json, "a", path_);
    const int64_t rank = require_int(a, "rows", 1, dim, path_);
    return LowRankStep{matrix(a, name + ".a", rank, dim),
                       matrix(require(json, "b", path_), name + ".b", dim, rank)};
  }

  void same_input(const std::string& name, const Linear& a, const Linear& b) {
    const bool same_signs = (a.input.signs == nullptr) == (b.input.signs == nullptr) &&
                            (!a.input.signs || std::memcmp(a.input.signs, b.input.signs,
                                                           static_cast<size_t>(a.input.size)) == 0);
    if (a.input.kind != b.input.kind || a.input.block != b.input.block || !same_signs) {
      throw bad(path_, name + ": its input transform differs from its neighbours'");
    }
  }

  const TqTensor* find(const std::string& name) {
    const auto it = tensors_.find(name);
    if (it == tensors_.end()) return nullptr;
    used_.insert(name);
    return it->second;
  }

  const TqTensor& tensor(const std::string& name, const std::string& dtype,
                         const std::vector<int64_t>& shape) {
    const TqTensor* found = find(name);
    if (!found) throw bad(path_, "tensor " + name + " is missing");
    if (found->dtype != dtype || found->shape != shape) {
      throw bad(path_, "tensor " + name + " is " + found->dtype + shape_text(found->shape) +
                           ", expected " + dtype + shape_text(shape));
    }
    return *found;
  }

  static std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
  }

  std::vector<float> vector(const std::string& name, int64_t size) {
    const TqTensor& found = tensor(name, "F32", {size});
    std::vector<float> values(static_cast<size_t>(size));
    std::memcpy(values.data(), file_.data() + found.offset, found.bytes);
    return values;
  }

  void only_keys(const Json& json, const std::string& where,
                 const std::set<std::string>& allowed) const {
    if (!json.is_object()) throw bad(path_, where + " is not an object");
    for (const auto& item : json.items()) {
      if (!allowed.count(item.key())) {
        throw bad(path_, where + ": unknown field \"" + item.key() + "\"", "use a newer tq");
      }
    }
  }

  Matrix matrix(const Json& json, const std::string& where, int64_t rows, int64_t cols) {
    only_keys(json, where, {"tensor", "storage", "rows", "cols", "group"});
    const std::string name = require_string(json, "tensor", path_);
    const std::string storage = require_string(json, "storage", path_);
    Matrix m;
    bool known = false;
    for (Storage s : {Storage::kF32, Storage::kF16, Storage::kBF16, Storage::kQ4, Storage::kQ8}) {
      if (storage != storage_name(s)) continue;
      m.storage = s;
      known = true;
    }
    if (!known) throw bad(path_, where + ": unknown storage " + storage, "use a newer tq");
    m.rows = require_int(json, "rows", 1, kMaxDim, path_);
    m.cols = require_int(json, "cols", 1, kMaxDim, path_);
    if (m.rows != rows || m.cols != cols) {
      throw bad(path_, where + " is " + shape_text({m.rows, m.cols}) + ", the config asks for " +
                           shape_text({rows, cols}));
    }
    if (m.packed()) {
      m.group = require_int(json, "group", 0, kMaxDim, path_);
      if (m.group != 32 && m.group != 64 && m.group != 128) {
        throw bad(path_,
                  where + ": group size " + std::to_string(m.group) + " is not 32, 64 or 128");
      }
      const TqTensor& scales = tensor(name + ".scales", "F16", {rows, m.n_groups()});
      m.scales = reinterpret_cast<const uint16_t*>(file_.data() + scales.offset);
    }
    m.data = file_.data() + tensor(name, storage, {rows, cols}).offset;
    return m;
  }

  const Json& linear_json(const std::string& name) {
    const Json& linears = require(header_, "linears", path_);
    if (!linears.is_object() || !linears.contains(name)) {
      throw bad(path_, "linear " + name + " is not described");
    }
    return linears[name];
  }

  Transform stream_basis(const std::string& where, int64_t size) {
    const Json& json = header_[where];
    if (require_string(json, "kind", path_) != "dense") return transform(json, where, size);
    only_keys(json, where, {"kind", "size", "matrix"});
    Transform t;
    t.kind = Transform::Kind::kDense;
    t.size = require_int(json, "size", size, size, path_);
    t.matrix = matrix(require(json, "matrix", path_), where + ".matrix", size, size);
    if (t.matrix.packed()) throw bad(path_, where + ".matrix must be F32, F16 or BF16");
    // Rounding moves a row of M by at most u of its length, u the unit roundoff of the storage, so
    // |M^T M - I|_F <= (2 u + u^2) sqrt(n). Twice that, and 1e-3 for what a learner in f32 leaves.
    const double u = t.matrix.storage == Storage::kF32   ? 0x1p-24
                     : t.matrix.storage == Storage::kF16 ? 0x1p-11
                                                         : 0x1p-8;
    const double error = orthogonality_error(t.matrix);
    if (!(error <= 1e-3 + 4 * u)) {
      throw bad(path_, where + ".matrix is not orthogonal: off by " + std::to_string(error));
    }
    return t;
  }

  Transform transform(const Json& json, const std::string& where, int64_t size) {
    const std::string kind = require_string(json, "kind", path_);
    if (kind == "dense") throw bad(path_, where + ": only the residual basis may be dense");
    only_keys(json, where, {"kind", "size", "block", "signs"});
    if (kind != "hadamard") {
      throw bad(path_, where + ": unknown transform " + kind, "use a newer tq");
    }
    Transform t;
    t.kind = Transform::Kind::kHadamard;
    t.size = require_int(json, "size", 1, kMaxDim, path_);
    t.block = require_int(json, "block", 1, kMaxDim, path_);
    if (t.size != size || t.size % t.block != 0 || hadamard_base_order(t.block) == 0) {
      throw bad(path_, where + ": Hadamard block " + std::to_string(t.block) + " of size " +
                           std::to_string(t.size) + " does not fit a width of " +
                           std::to_string(size));
    }
    if (optional_bool(json, "signs", false, path_)) {
      const TqTensor& signs = tensor(where + ".signs", "I8", {size});
      t.signs = reinterpret_cast<const int8_t*>(file_.data() + signs.offset);
      for (int64_t i = 0; i < size; ++i) {
        if (t.signs[i] != 1 && t.signs[i] != -1) {
          throw bad(path_, where + ".signs: element " + std::to_string(i) + " is not +1 or -1");
        }
      }
    }
    return t;
  }

  Linear linear(const std::string& name, int64_t out, int64_t in) {
    const Json& json = linear_json(name);
    only_keys(json, name, {"weight", "branch_a", "branch_b", "input", "act", "exponents"});
    Linear linear;
    linear.weight = matrix(require(json, "weight", path_), name, out, in);
    if (json.contains("branch_a") != json.contains("branch_b")) {
      throw bad(path_, name + ": half of the low-rank branch is missing");
    }
    if (json.contains("branch_a")) {
      const Json& a = json["branch_a"];
      const int64_t rank = require_int(a, "rows", 1, std::min(in, out), path_);
      linear.branch_a = matrix(a, name + ".branch_a", rank, in);
      linear.branch_b = matrix(json["branch_b"], name + ".branch_b", out, rank);
      if (linear.branch_a->packed() != linear.branch_b->packed()) {
        throw bad(path_, name + ": one branch factor is packed, the other is not");
      }
    }
    if (json.contains("input")) linear.input = transform(json["input"], name + ".input", in);
    linear.act = act(require(json, "act", path_), name, in);
    if (optional_bool(json, "exponents", false, path_)) linear.exponents = exponents(name, out);
    return linear;
  }

  const int8_t* exponents(const std::string& name, int64_t out) {
    if (name == "lm_head") throw bad(path_, "lm_head: exponents are for the linears of layers");
    const TqTensor& found = tensor(name + ".exponents", "I8", {out});
    const int8_t* values = reinterpret_cast<const int8_t*>(file_.data() + found.offset);
    for (int64_t i = 0; i < out; ++i) {
      if (values[i] < kMinExponent) {
        throw bad(path_, name + ".exponents: element " + std::to_string(i) + " is " +
                             std::to_string(values[i]) + ", below " + std::to_string(kMinExponent));
      }
    }
    return values;
  }

  ActQuant act(const Json& json, const std::string& name, int64_t cols) {
    only_keys(json, name + ".act",
              {"bits", "group", "clip", "full_range", "asymmetric", "two_level"});
    ActQuant act;
    act.bits = static_cast<int>(require_int(json, "bits", 3, 16, path_));
    if (act.bits == 16) return act;
    act.group = require_int(json, "group", 0, kMaxDim, path_);
    act.clip = static_cast<float>(optional_number(json, "clip", 1.0, path_));
    const bool full_range = optional_bool(json, "full_range", false, path_);
    const bool asymmetric = optional_bool(json, "asymmetric", false, path_);
    if (asymmetric && (full_range || act.bits == 8)) {
      throw bad(path_, name + ": asymmetric codes " +
                           (full_range ? "contradict full_range" : "of 8 bits do not fit a byte"));
    }
    act.two_level = optional_bool(json, "two_level", false, path_);
    if (act.two_level && (asymmetric || (act.bits == 8 && act.group != cols))) {
      throw bad(path_, name + ": two-level scales " +
                           (asymmetric ? "contradict asymmetric codes"
                                       : "of 8 bits need one group a token"));
    }
    if (full_range) act.codes = ActCodes::kAll;
    if (asymmetric) act.codes = ActCodes::kAsymmetric;
    const bool groups = act.group == 32 || act.group == 64 || act.group == 128 ||
                        (act.group > 0 && act.group < cols && act.group % 32 == 0) ||
                        act.group == cols;
    if ((act.bits != 3 && act.bits != 4 && act.bits != 8) || !groups ||
        !(act.clip > 0.0f && act.clip <= 1.0f)) {
      throw bad(path_, name + ": activations of " + std::to_string(act.bits) + " bits, group " +
                           std::to_string(act.group) + ", clip " + std::to_string(act.clip) +
                           " are not supported");
    }
    return act;
  }

  const MappedFile& file_;
  const std::string path_;
  const Json& header_;
  std::map<std::string, const TqTensor*> tensors_;
  std::set<std::string> used_;
};

}  // namespace

std::string hash_text(uint64_t hash) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

const char* storage_name(Storage storage) {
  switch (storage) {
    case Storage::kF32:
      return "F32";
    case Storage::kF16:
      return "F16";
    case Storage::kBF16:
      return "BF16";
    case Storage::kQ4:
      return "Q4";
    case Storage::kQ8:
      return "Q8";
  }
  return "?";
}

bool looks_like_tq(const std::string& path) {
  return begins_with(path, {reinterpret_cast<const char*>(kTqMagic), sizeof kTqMagic});
}

TqLayout read_tq_layout(const MappedFile& file) {
  const std::string& path = file.path();
  if (file.size() < sizeof(TqPrologue)) {
    throw bad(path, "the file has " + std::to_string(file.size()) + " bytes", "incomplete copy?");
  }
  TqPrologue prologue;
  std::memcpy(&prologue, file.data(), sizeof prologue);
  check_prologue(file, prologue);
  const char* text = reinterpret_cast<const char*>(file.data() + prologue.header_offset);
  if (XXH3_64bits(text, prologue.header_bytes) != prologue.header_hash) {
    throw bad(path, "checksum of the header does not match", "copy the file again");
  }
  TqLayout layout;
  layout.header_offset = prologue.header_offset;
  layout.header = parse_json({text, prologue.header_bytes}, path);
  const Json& tensors = require(layout.header, "tensors", path);
  if (!tensors.is_array()) throw bad(path, "the tensor table is not an array");
  uint64_t end = sizeof(TqPrologue);
  for (const Json& json : tensors) {
    TqTensor tensor = parse_tensor(path, json);
    const uint64_t begin = (end + kTqAlignment - 1) / kTqAlignment * kTqAlignment;
    if (tensor.offset != begin || tensor.offset > layout.header_offset ||
        tensor.bytes > layout.header_offset - tensor.offset) {
      throw bad(path, "tensor " + tensor.name + ": " + std::to_string(tensor.bytes) +
                          " bytes at offset " + std::to_string(tensor.offset) +
                          " do not follow the tensor before it");
    }
    if (tensor.bytes != expected_bytes(path, tensor)) {
      throw bad(path, "tensor " + tensor.name + ": " + std::to_string(tensor.bytes) +
                          " bytes do not fit its shape");
    }
    end = tensor.offset + tensor.bytes;
    layout.tensors.push_back(std::move(tensor));
  }
  if ((end + kTqAlignment - 1) / kTqAlignment * kTqAlignment != layout.header_offset) {
    throw bad(path, "there are bytes between the last tensor and the header");
  }
  return layout;
}

Model load_tq_file(const std::string& path, Verify verify) {
  auto file = std::make_shared<MappedFile>(path);
  TqLayout layout = read_tq_layout(*file);
  if (verify == Verify::kAll) {
    check_contents(*file, layout);
  } else {
    for (const TqTensor& tensor : layout.tensors) {
      if (tensor.name.starts_with("text.")) check_tensor(*file, tensor);
    }
  }
  Model model = Reader(*file, layout).read();
  model.source = path;
  model.owner = file;
  return model;
}

}  // namespace tq
