// hf_folder - a Hugging Face model folder as an unquantized Model, and load_model(), the one door
// for folders and .tq files (both in weights.h).
//
// Config, tensor names, shapes and dtypes are validated before anything runs. The contents of
// tokenizer.json are not looked at: see tokenizer/tokenizer.h.
#include <cstring>
#include <filesystem>
#include <set>
#include <string_view>

#include "model/error.h"
#include "model/folder_files.h"
#include "model/safetensors.h"
#include "model/tq_file.h"
#include "model/weights.h"

namespace tq {
namespace {

// The largest known are a tenth of these.
constexpr size_t kMaxConfigBytes = size_t{4} << 20, kMaxTokenizerConfigBytes = size_t{64} << 20,
                 kMaxTokenizerBytes = size_t{256} << 20;

std::string required_text(const std::string& folder, const std::string& name, size_t max_bytes) {
  if (!in_folder(folder, name)) {
    if (name == "config.json") explain_missing(folder, name + " not found");
    throw Error(ErrorKind::kBadData, "not a model folder", folder, name + " not found");
  }
  std::string text = folder_text(folder, name, max_bytes);
  if (text.empty()) {
    throw Error(ErrorKind::kBadData, "bad model folder", folder + "/" + name, "the file is empty");
  }
  return text;
}

enum class PathKind { kFolder, kFile };

// Throws kIo for what is neither: nothing there, no permission, a pipe (reading it would wait).
PathKind path_kind(const std::string& path, const std::string& expected) {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (status.type() == fs::file_type::directory) return PathKind::kFolder;
  if (status.type() == fs::file_type::regular) return PathKind::kFile;
  if (status.type() == fs::file_type::not_found) {
    throw Error(ErrorKind::kIo, "model does not exist", path, "expected " + expected);
  }
  throw Error(ErrorKind::kIo, "cannot open model", path,
              error ? error.message() : "neither a file nor a folder", "expected " + expected);
}

void check_is_folder(const std::string& path) {
  const std::string expected = "a folder with config.json, tokenizer.json and safetensors files";
  if (path_kind(path, expected) == PathKind::kFolder) return;
  refuse_lfs_pointer_at(path);
  const bool gguf = begins_with(path, "GGUF");
  if (gguf || looks_like_tq(path)) {
    throw Error(ErrorKind::kBadData, "model is already quantized", path,
                gguf ? "it is a GGUF file" : "it is a .tq file",
                "give the original Hugging Face folder");
  }
  throw Error(ErrorKind::kIo, "not a model folder", path, "it is a file, expected " + expected);
}

// What the views of a folder's Model point to.
struct Shards {
  explicit Shards(const std::string& folder) : shards(folder) {}
  SafetensorsFolder shards;
  std::vector<AlignedBuffer> copies;  // tensors whose bytes are not aligned in the file
};

// Bit for bit if stored alike, else by value: an exporter may widen one copy of a shared matrix.
bool same_values(const Matrix& a, const Matrix& b) {
  if (a.storage == b.storage) return std::memcmp(a.data, b.data, a.data_bytes()) == 0;
  std::vector<float> row_a(static_cast<size_t>(a.cols)), row_b(static_cast<size_t>(b.cols));
  for (int64_t row = 0; row < a.rows; ++row) {
    matrix_row_f32(a, row, row_a.data());
    matrix_row_f32(b, row, row_b.data());
    if (row_a != row_b) return false;
  }
  return true;
}

class FolderReader {
 public:
  FolderReader(const std::string& folder, const Config& config)
      : folder_(folder), config_(config), storage_(std::make_shared<Shards>(folder)) {}

  Model read() {
    const Config& c = config_;
    Model model;
    model.tok_embed = matrix(embedding_name(), c.vocab_size, c.dim);
    model.lm_head.weight = head(model.tok_embed);
    model.final_norm = vector("model.norm.weight", c.dim);
    for (int64_t i = 0; i < c.n_layers; ++i) model.layers.push_back(layer(i));
    check_nothing_left();
    model.owner = storage_;
    model.release = [storage = storage_](const Matrix& m) {
      storage->shards.release(m.data, m.data_bytes());
    };
    model.check_unchanged = [storage = storage_] { storage->shards.check_unchanged(); };
    model.notes = storage_->shards.unread();
    return model;
  }

 private:
  Layer layer(int64_t index) {
    const Config& c = config_;
    const std::string prefix = "model.layers." + std::to_string(index) + ".";
    const auto linear = [&](const char* name, int64_t out, int64_t in) {
      Linear linear;
      linear.weight = matrix(prefix + name + ".weight", out, in);
      return linear;
    };
    Layer layer;
    layer.attn_norm = vector(prefix + "input_layernorm.weight", c.dim);
    layer.ffn_norm = vector(prefix + "post_attention_layernorm.weight", c.dim);
    if (c.has_qk_norm()) {
      layer.q_norm = vector(prefix + "self_attn.q_norm.weight", c.head_dim);
      layer.k_norm = vector(prefix + "self_attn.k_norm.weight", c.head_dim);
    }
    layer.wq = linear("self_attn.q_proj", c.q_dim(), c.dim);
    layer.wk = linear("self_attn.k_proj", c.kv_dim(), c.dim);
    layer.wv = linear("self_attn.v_proj", c.kv_dim(), c.dim);
    layer.wo = linear("self_attn.o_proj", c.dim, c.q_dim());
    layer.w_gate = linear("mlp.gate_proj", c.hidden_dim, c.dim);
    layer.w_up = linear("mlp.up_proj", c.hidden_dim, c.dim);
    layer.w_down = linear("mlp.down_proj", c.dim, c.hidden_dim);
    return layer;
  }

  // A tied model may keep its one table under the head's name.
  std::string embedding_name() const {
    const std::string name = "model.embed_tokens.weight", head = "lm_head.weight";
    const SafetensorsFolder& shards = storage_->shards;
    return config_.tied && !shards.contains(name) && shards.contains(head) ? head : name;
  }

  // The four cases of tied embeddings: flag and tensor list must tell the same story.
  Matrix head(const Matrix& tok_embed) {
    const std::string name = "lm_head.weight";
    const bool present = storage_->shards.contains(name);
    if (!config_.tied) {
      if (!present) {
        throw Error(ErrorKind::kBadData, "weight is missing", folder_,
                    name + ", and config.json does not tie it to the embedding",
                    "if the model shares them, set \"tie_word_embeddings\": true in config.json");
      }
      return matrix(name, config_.vocab_size, config_.dim);
    }
    if (present && !same_values(matrix(name, config_.vocab_size, config_.dim), tok_embed)) {
      throw Error(ErrorKind::kBadData, "tied embeddings contradict the weights", folder_,
                  "tie_word_embeddings is true, but lm_head.weight differs from the embedding",
                  "if the model does not share them, set \"tie_word_embeddings\": false");
    }
    return tok_embed;
  }

  TensorView view(const std::string& name, const std::vector<int64_t>& shape) {
    used_.insert(name);
    return storage_->shards.get(name, shape);
  }

  Matrix matrix(const std::string& name, int64_t rows, int64_t cols) {
    const TensorView tensor = view(name, {rows, cols});
    Matrix m;
    m.storage = tensor.dtype == DType::kF32   ? Storage::kF32
                : tensor.dtype == DType::kF16 ? Storage::kF16
                                              : Storage::kBF16;
    m.rows = rows;
    m.cols = cols;
    m.data = tensor.data;
    // The format does not align tensors. Nearly every writer does; the others cost a copy.
    if (reinterpret_cast<uintptr_t>(m.data) % dtype_size(tensor.dtype) != 0) {
      AlignedBuffer& copy = storage_->copies.emplace_back(tensor.n_bytes());
      std::memcpy(copy.as<std::byte>(), tensor.data, tensor.n_bytes());
      m.data = copy.as<std::byte>();
    }
    return m;
  }

  std::vector<float> vector(const std::string& name, int64_t size) {
    return to_f32(view(name, {size}));
  }

  // A tensor that we would not read is a part of the model that we would leave out.
  void check_nothing_left() const {
    std::vector<std::string> left;
    for (const std::string& name : storage_->shards.names()) {
      // rotary_emb: recomputable tables that old exporters stored.
      if (!used_.count(name) && !name.ends_with(".rotary_emb.inv_freq")) left.push_back(name);
    }
    if (left.empty()) return;
    const std::string more =
        left.size() > 1 ? " and " + std::to_string(left.size() - 1) + " more" : "";
    throw Error(ErrorKind::kBadData, "weight not supported", folder_,
                left[0] + more + ": not part of the " +
                    (config_.arch == Arch::kQwen3 ? "Qwen3" : "Llama") +
                    " model that config.json describes");
  }

  std::string folder_;
  const Config& config_;
  std::shared_ptr<Shards> storage_;
  std::set<std::string> used_;
};

}  // namespace

Model load_hf_folder(const std::string& folder) {
  check_is_folder(folder);
  ModelTexts texts;
  texts.config = required_text(folder, "config.json", kMaxConfigBytes);
  const Config config = parse_config(texts.config, folder + "/config.json");
  texts.tokenizer = required_text(folder, "tokenizer.json", kMaxTokenizerBytes);
  texts.tokenizer_config = folder_text(folder, "tokenizer_config.json", kMaxTokenizerConfigBytes);
  texts.generation_config = folder_text(folder, "generation_config.json", kMaxConfigBytes);
  texts.chat_template = folder_text(folder, "chat_template.jinja", kMaxConfigBytes);
  Model model = FolderReader(folder, config).read();
  model.config = config;
  model.texts = std::move(texts);
  model.quantization = {{"method", "none"}};
  model.source = folder;
  return model;
}

Model load_model(const std::string& path, Verify verify) {
  const PathKind kind = path_kind(path, "a .tq file or a Hugging Face model folder");
  if (kind == PathKind::kFolder) return load_hf_folder(path);
  if (looks_like_tq(path)) return load_tq_file(path, verify);
  refuse_lfs_pointer_at(path);
  std::string why = "neither a .tq file nor a model folder", hint;
  if (begins_with(path, "GGUF")) {
    why = "it is a GGUF file";
    hint = "tq reads .tq files and Hugging Face folders";
  } else if (path.ends_with(".safetensors")) {
    why = "it is a single safetensors file";
    hint = "give the folder that holds it, with config.json and tokenizer.json";
  }
  throw Error(ErrorKind::kBadData, "not a model", path, why, hint);
}

}  // namespace tq
