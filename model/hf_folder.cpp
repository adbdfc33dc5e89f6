// hf_folder - a Hugging Face model folder as an unquantized Model, and load_model(), the one door
// for both kinds of input. Everything is validated before anything runs.
#include <cmath>
#include <cstring>
#include <filesystem>
#include <set>

#include "model/error.h"
#include "model/safetensors.h"
#include "model/tq_file.h"
#include "model/weights.h"

namespace tq {
namespace {

constexpr size_t kMaxTextBytes = size_t{256} << 20;

std::string optional_text(const std::string& path) {
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) return "";
  return read_text_file(path, kMaxTextBytes);
}

std::string required_text(const std::string& folder, const std::string& name) {
  std::string text = optional_text(folder + "/" + name);
  if (text.empty()) {
    throw Error(ErrorKind::kBadData, "not a model folder", folder, name + " not found or empty");
  }
  return text;
}

// What the views of a folder's Model point to.
struct Shards {
  explicit Shards(const std::string& folder) : shards(folder) {}
  SafetensorsFolder shards;
  std::vector<AlignedBuffer> copies;  // tensors whose bytes are not aligned in the file
};

class FolderReader {
 public:
  FolderReader(const std::string& folder, const Config& config)
      : folder_(folder), config_(config), storage_(std::make_shared<Shards>(folder)) {}

  Model read() {
    const Config& c = config_;
    Model model;
    model.tok_embed = matrix("model.embed_tokens.weight", c.vocab_size, c.dim);
    model.lm_head.weight = head(model.tok_embed);
    model.final_norm = vector("model.norm.weight", c.dim);
    for (int64_t i = 0; i < c.n_layers; ++i) model.layers.push_back(layer(i));
    check_nothing_left();
    model.owner = storage_;
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

  // The four cases of tied embeddings: flag and tensor list must tell the same story.
  Matrix head(const Matrix& tok_embed) {
    const std::string name = "lm_head.weight";
    const bool present = storage_->shards.contains(name);
    if (!config_.tied) {
      if (!present) {
        throw Error(ErrorKind::kBadData, "weight is missing", folder_,
                    name + ", and config.json does not tie it to the embedding",
                    "if the model shares them, set \"tie_word_embeddings\": true");
      }
      return matrix(name, config_.vocab_size, config_.dim);
    }
    if (present) {
      const Matrix head = matrix(name, config_.vocab_size, config_.dim);
      if (head.storage != tok_embed.storage ||
          std::memcmp(head.data, tok_embed.data, head.data_bytes()) != 0) {
        throw Error(ErrorKind::kBadData, "tied embeddings contradict the weights", folder_,
                    "tie_word_embeddings is true, but lm_head.weight differs from the embedding");
      }
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
    for (const std::string& name : storage_->shards.names()) {
      if (used_.count(name)) continue;
      // Recomputable tables that old exporters stored.
      if (name.ends_with(".rotary_emb.inv_freq")) continue;
      throw Error(ErrorKind::kBadData, "weight not supported", folder_,
                  name + " is not part of a plain Llama or Qwen3 model");
    }
  }

  std::string folder_;
  const Config& config_;
  std::shared_ptr<Shards> storage_;
  std::set<std::string> used_;
};

}  // namespace

void check_finite(const Matrix& matrix, const std::string& name, const std::string& where) {
  std::vector<float> row(static_cast<size_t>(matrix.cols));
  int64_t count = 0, first = -1;
  for (int64_t r = 0; r < matrix.rows; ++r) {
    matrix_row_f32(matrix, r, row.data());
    for (int64_t c = 0; c < matrix.cols; ++c) {
      if (std::isfinite(row[static_cast<size_t>(c)])) continue;
      if (count++ == 0) first = r * matrix.cols + c;
    }
  }
  if (count == 0) return;
  throw Error(ErrorKind::kBadData, "weights are not finite", where,
              name + " has " + std::to_string(count) + " NaN or infinite values, the first at " +
                  std::to_string(first));
}

Model load_hf_folder(const std::string& folder) {
  ModelTexts texts;
  texts.config = required_text(folder, "config.json");
  const Config config = parse_config(texts.config, folder + "/config.json");
  texts.tokenizer = required_text(folder, "tokenizer.json");
  texts.tokenizer_config = optional_text(folder + "/tokenizer_config.json");
  texts.generation_config = optional_text(folder + "/generation_config.json");
  texts.chat_template = optional_text(folder + "/chat_template.jinja");
  Model model = FolderReader(folder, config).read();
  model.config = config;
  model.texts = std::move(texts);
  model.quantization = {{"method", "none"}};
  model.source = folder;
  return model;
}

Model load_model(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status)) {
    throw Error(ErrorKind::kIo, "no such model", path,
                "expected a .tq file or a Hugging Face model folder");
  }
  if (fs::is_directory(status)) return load_hf_folder(path);
  if (looks_like_tq(path)) return load_tq_file(path);
  const MappedFile file(path);
  const std::string_view begin(reinterpret_cast<const char*>(file.data()),
                               std::min<size_t>(file.size(), 16));
  std::string hint = "make one with: tq quantize HF_DIR -o model.tq";
  if (begin.starts_with("GGUF")) hint = "a GGUF file; tq reads Hugging Face folders";
  if (path.ends_with(".safetensors")) hint = "give the folder that holds the safetensors file";
  throw Error(ErrorKind::kBadData, "not a model", path, "not a .tq file", hint);
}

}  // namespace tq
