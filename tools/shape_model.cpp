// shape_model - see shape_model.h.
#include "tools/shape_model.h"

#include <algorithm>
#include <random>

#include "model/error.h"

namespace tq {
namespace {

struct Shape {
  const char* name;
  Arch arch;
  int64_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size;
  bool tied;
};

constexpr Shape kShapes[] = {
    {"llama3.2-1b", Arch::kLlama, 2048, 8192, 16, 32, 8, 64, 128256, true},
    {"llama3-8b", Arch::kLlama, 4096, 14336, 32, 32, 8, 128, 128256, false},
    {"qwen3-0.6b", Arch::kQwen3, 1024, 3072, 28, 16, 8, 128, 151936, true},
    {"qwen3-1.7b", Arch::kQwen3, 2048, 6144, 28, 16, 8, 128, 151936, true},
    {"qwen3-8b", Arch::kQwen3, 4096, 12288, 36, 32, 8, 128, 151936, false},
};

// Random bytes that serve as codes of any matrix, and elements and scales of sensible size.
struct Pool {
  std::vector<uint32_t> codes;
  std::vector<uint16_t> dense, scales;

  explicit Pool(size_t n_elements) {
    std::mt19937 generator(1);
    codes.resize(n_elements / 4 + 1);
    for (uint32_t& word : codes) {
      word = generator();
      // -128 is not a code of 8 bits.
      for (int i = 0; i < 32; i += 8) {
        if ((word >> i & 255) == 128) word ^= 1u << i;
      }
    }
  }
  void add_dense(size_t n_elements) {
    std::mt19937 generator(2);
    dense.resize(n_elements);
    for (uint16_t& value : dense) {
      const float x = static_cast<float>(static_cast<int32_t>(generator())) * 0x1p-31f * 0.03f;
      value = f32_to_bf16(x);
    }
  }
  // Two-level ones, which are as good as any.
  void add_scales(size_t count) {
    std::mt19937 generator(3);
    scales.resize(count);
    for (uint16_t& value : scales) {
      value = f32_to_f16(static_cast<float>(1 + generator() % kMostMultiple) * 5 * 0x1p-14f);
    }
  }
};

class Builder {
 public:
  Builder(const Shape& shape, const ShapeOptions& options) : options_(options) {
    const int64_t widest = std::max({shape.hidden_dim, shape.n_heads * shape.head_dim, shape.dim});
    const int64_t head = shape.vocab_size * shape.dim;
    const int64_t largest = std::max(head, widest * shape.dim);
    pool_ = std::make_shared<Pool>(static_cast<size_t>(largest));
    pool_->add_scales(static_cast<size_t>(largest / 32));
    pool_->add_dense(
        static_cast<size_t>(options.bits_w == 16 || options.head_bits == 16 ? largest : 1));
  }
  std::shared_ptr<Pool> pool() const { return pool_; }

  Matrix matrix(int bits, int64_t rows, int64_t cols, int64_t group) const {
    Matrix m;
    m.rows = rows;
    m.cols = cols;
    m.storage = bits == 4 ? Storage::kQ4 : bits == 8 ? Storage::kQ8 : Storage::kBF16;
    m.data = m.packed() ? reinterpret_cast<const std::byte*>(pool_->codes.data())
                        : reinterpret_cast<const std::byte*>(pool_->dense.data());
    if (m.packed()) {
      m.group = group;
      m.scales = pool_->scales.data();
    }
    return m;
  }

  Linear linear(int64_t out, int64_t in) const {
    Linear linear;
    linear.weight = matrix(options_.bits_w, out, in, options_.group);
    linear.act.bits = options_.bits_a;
    linear.act.group = options_.group;
    linear.act.codes = ActCodes::kAll;
    linear.act.two_level = options_.two_level;
    if (options_.two_level && options_.bits_a == 8) linear.act.group = in;
    if (options_.rank > 0) {
      linear.branch_a = matrix(options_.bits_w, options_.rank, in, options_.group);
      linear.branch_b = matrix(options_.bits_w, out, options_.rank, options_.group);
    }
    return linear;
  }

 private:
  ShapeOptions options_;
  std::shared_ptr<Pool> pool_;
};

}  // namespace

std::vector<std::string> shape_names() {
  std::vector<std::string> names;
  for (const Shape& shape : kShapes) names.push_back(shape.name);
  return names;
}

Model random_model(const std::string& name, const ShapeOptions& options) {
  const auto* shape = std::find_if(std::begin(kShapes), std::end(kShapes),
                                   [&](const Shape& known) { return name == known.name; });
  if (shape == std::end(kShapes)) {
    throw Error(ErrorKind::kUsage, "unknown shape", "--shape " + name, "not in the list");
  }
  Model model;
  Config& config = model.config;
  config.arch = shape->arch;
  config.dim = shape->dim;
  config.hidden_dim = shape->hidden_dim;
  config.n_layers = shape->n_layers;
  config.n_heads = shape->n_heads;
  config.n_kv_heads = shape->n_kv_heads;
  config.head_dim = shape->head_dim;
  config.vocab_size = shape->vocab_size;
  config.max_seq_len = 131072;
  config.norm_eps = 1e-6f;
  config.tied = shape->tied;
  config.rope.theta = 1e6;
  const Builder builder(*shape, options);
  model.owner = builder.pool();
  model.source = name + ", random weights";
  model.quantization = {{"method", options.bits_w == 16 ? "none" : "random"}};
  model.tok_embed = builder.matrix(options.head_bits, config.vocab_size, config.dim, options.group);
  model.lm_head.weight = model.tok_embed;
  model.final_norm.assign(static_cast<size_t>(config.dim), 1.0f);
  for (int64_t i = 0; i < config.n_layers; ++i) {
    Layer layer;
    layer.attn_norm = layer.ffn_norm = model.final_norm;
    if (config.has_qk_norm()) {
      layer.q_norm = layer.k_norm = std::vector<float>(static_cast<size_t>(config.head_dim), 1.0f);
    }
    layer.wq = builder.linear(config.q_dim(), config.dim);
    layer.wk = builder.linear(config.kv_dim(), config.dim);
    layer.wv = builder.linear(config.kv_dim(), config.dim);
    layer.wo = builder.linear(config.dim, config.q_dim());
    layer.w_gate = builder.linear(config.hidden_dim, config.dim);
    layer.w_up = builder.linear(config.hidden_dim, config.dim);
    layer.w_down = builder.linear(config.dim, config.hidden_dim);
    model.layers.push_back(layer);
  }
  return model;
}

}  // namespace tq
