// preflight - checks before work. See preflight.h.
#include "quant/preflight.h"

#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "model/atomic_file.h"
#include "model/error.h"
#include "model/memory.h"
#include "quant/learn.h"

namespace tq {
namespace {

// Program, tokenizer and JSON trees, which do not grow with the weights.
constexpr uint64_t kBaseMemory = 100u << 20;
// Rows of logits at a time (cpu/autodiff_head.cpp): of both models, and their gradient.
constexpr int64_t kLogitRows = 128;
// JSON of one tensor in the header plus padding to 64 bytes, and of one linear.
constexpr uint64_t kHeaderPerLinear = 700;

std::string parent_folder(const std::string& path) {
  const size_t slash = path.find_last_of('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

uint64_t table_size(int64_t vocab, int64_t dim, int bits, int64_t group) {
  const uint64_t elements = static_cast<uint64_t>(vocab) * static_cast<uint64_t>(dim);
  const uint64_t n_groups = static_cast<uint64_t>((dim + group - 1) / group);
  return elements * static_cast<uint64_t>(bits) / 8 +
         (bits < 16 ? static_cast<uint64_t>(vocab) * n_groups * 2 : 0);
}

int64_t n_bases(const QuantizeOptions& options, const Config& c) {
  if (!options.learns_basis()) return 0;
  return options.basis == Basis::kLayerwise ? 2 * c.n_layers + 1 : 1;
}

// What a layer keeps on the tape for its gradient, beside its weights.
uint64_t activations(int64_t rows, const Config& c) {
  return 4 * static_cast<uint64_t>(rows * (12 * c.dim + 8 * c.q_dim() + 8 * c.hidden_dim));
}

// Weights of rank r on both sides of every linear of the model.
uint64_t branch_elements(const QuantizeOptions& options, const Config& c) {
  uint64_t elements = 0;
  for (const LinearPlan& linear : plan_layer(options, c, 0)) {
    elements += static_cast<uint64_t>(c.n_layers * options.rank * (linear.out + linear.in));
  }
  return elements;
}

bool learns_branches(const QuantizeOptions& options) {
  return options.learns_basis() && options.rounds_branch() && options.split == Split::kSvd;
}

// The inputs of all layers, from which a basis is learned, and what one visit of a layer needs: its
// weights, those in the basis, those rounded, and gradients as they come and go (measured with the
// block of an 8B model: 3.3 times the weights).
uint64_t learning_memory(const QuantizeOptions& options, const Config& c, uint64_t layer) {
  if (!options.learns_basis()) return 0;
  const uint64_t widths = static_cast<uint64_t>(2 * c.dim + c.q_dim() + c.hidden_dim);
  // For the losses of predictions: the head, logits, and the stream before every layer.
  const uint64_t bank =
      options.learns_from_predictions()
          ? 4 * static_cast<uint64_t>((c.vocab_size + options.calib_length * (c.n_layers + 2)) *
                                          c.dim +
                                      3 * kLogitRows * c.vocab_size) +
                activations(options.calib_length, c)
          : 4 * static_cast<uint64_t>(InputBank::kTokens * c.n_layers) * widths;
  // f64 matrix, two moments and result, f32 copy and gradient.
  const uint64_t bases = 40 * static_cast<uint64_t>(n_bases(options, c) * c.dim * c.dim +
                                                    c.n_layers * c.head_dim * c.head_dim);
  // The residual beside the weight; factors and gradients in f32.
  const uint64_t branches =
      learns_branches(options) ? 2 * layer + 8 * branch_elements(options, c) : 0;
  return bank + 4 * layer + bases + branches;
}

// All codes and scales, the head in f32, the stream before every layer, one layer on the tape.
uint64_t refining_memory(const QuantizeOptions& options, const Config& c, uint64_t layer,
                         uint64_t layer_bytes) {
  if (options.refine_steps == 0) return 0;
  const uint64_t n_layers = static_cast<uint64_t>(c.n_layers);
  const uint64_t scales = 20 * n_layers * layer / 4 / static_cast<uint64_t>(options.group);
  const uint64_t head = 4 * static_cast<uint64_t>(c.vocab_size * c.dim);
  const uint64_t stream = 4 * static_cast<uint64_t>(options.calib_length * c.dim) * (n_layers + 2);
  return n_layers * layer_bytes + scales + head + stream + activations(options.calib_length, c) +
         2 * layer;
}

// Learned bases and the steps between them, as quantize_layer.cpp stores them.
uint64_t basis_bytes(const QuantizeOptions& options, const Config& c) {
  if (!options.learns_basis()) return 0;
  int64_t elements = c.dim * c.dim;
  if (options.basis == Basis::kLayerwise) {
    elements += c.dim * c.dim + 2 * c.n_layers * 2 * std::min(options.basis_rank, c.dim) * c.dim;
  }
  return static_cast<uint64_t>(elements) * (options.bits_w == 32 ? 4 : 2);
}

// What resume.h keeps of them, in f64, with the branches whose G was learned, in f32.
uint64_t learned_bytes(const QuantizeOptions& options, const Config& c) {
  if (!options.learns_basis()) return 0;
  const uint64_t bases = 8 * static_cast<uint64_t>(n_bases(options, c) * c.dim * c.dim +
                                                   c.n_layers * c.head_dim * c.head_dim);
  return bases + (learns_branches(options) ? 4 * branch_elements(options, c) : 0);
}

// One layer in flight, its second moments, and the stream of all tokens (see pipeline.cpp).
uint64_t estimate_memory(const QuantizeOptions& options, const Config& c, uint64_t layer_weights,
                         uint64_t layer_bytes, int64_t n_tokens) {
  const auto square = [](int64_t n) { return static_cast<uint64_t>(n) * static_cast<uint64_t>(n); };
  const uint64_t largest =
      static_cast<uint64_t>(std::max({c.hidden_dim * c.dim, c.q_dim() * c.dim}));
  const uint64_t layer = 4 * layer_weights;
  uint64_t moments = 0, factor = 0, stream = 0;
  if (n_tokens > 0) {
    // Second moments in f64, with correction the drift in f32.
    moments = (options.rounding == RoundingKind::kGptqCorrected ? 12 : 8) *
              (2 * square(c.dim) + square(c.q_dim()) + square(c.hidden_dim));
    if (options.rounds_branch()) {
      moments += 4 * static_cast<uint64_t>(n_tokens) *
                 static_cast<uint64_t>(2 * c.dim + c.q_dim() + c.hidden_dim);
    }
    factor = 12 * square(std::max({c.dim, c.q_dim(), c.hidden_dim}));
    stream =
        4 * static_cast<uint64_t>(n_tokens * c.dim) +
        4 * static_cast<uint64_t>(options.calib_length) *
            static_cast<uint64_t>(4 * c.dim + 3 * c.q_dim() + 4 * c.kv_dim() + 4 * c.hidden_dim);
  }
  const uint64_t calibrating = 2 * layer + moments + stream;  // f32 weights and the backend's copy
  const uint64_t rounding = layer + moments + factor + stream + layer_bytes + 8 * largest +
                            (options.rank > 0 ? 24 * largest : 0);
  const uint64_t table = static_cast<uint64_t>(c.vocab_size * c.dim) *
                         (std::min(options.embed_bits, options.head_bits) < 16 ? 5 : 2);
  const uint64_t refining = stream + refining_memory(options, c, layer, layer_bytes);
  // The basis, with its branches, stays; what is to be refined waits until the last layer is done.
  const uint64_t kept = learned_bytes(options, c);
  const uint64_t waiting =
      options.refine_steps > 0 ? static_cast<uint64_t>(c.n_layers) * layer_bytes : 0;
  return kBaseMemory + std::max({learning_memory(options, c, layer), kept + waiting + calibrating,
                                 kept + waiting + rounding, kept + refining, table});
}

}  // namespace

QuantizePlan make_plan(const Model& model, const QuantizeOptions& options, int64_t n_tokens) {
  const Config& c = model.config;
  QuantizePlan plan;
  uint64_t layer_weights = 0, layer_bytes = 0, dense_bytes = 0;
  for (int64_t layer = 0; layer < c.n_layers; ++layer) {
    uint64_t weights = 0, bytes = 0;
    for (const LinearPlan& linear : plan_layer(options, c, layer)) {
      weights += static_cast<uint64_t>(linear.out * linear.in);
      bytes += linear_bytes(options, linear);
    }
    plan.n_linear_weights += static_cast<int64_t>(weights);
    plan.linear_bytes += bytes;
    layer_weights = std::max(layer_weights, weights);
    layer_bytes = std::max(layer_bytes, bytes);
    dense_bytes += 4 * static_cast<uint64_t>(2 * c.dim + (c.has_qk_norm() ? 2 * c.head_dim : 0));
  }
  plan.linear_bytes += basis_bytes(options, c);
  plan.table_bytes = table_size(c.vocab_size, c.dim, options.embed_bits, options.group);
  if (!c.tied) {
    plan.table_bytes += table_size(c.vocab_size, c.dim, options.head_bits, options.group);
  }
  const ModelTexts& texts = model.texts;
  const uint64_t text_bytes = texts.config.size() + texts.tokenizer.size() +
                              texts.tokenizer_config.size() + texts.generation_config.size() +
                              texts.chat_template.size();
  plan.output_bytes = plan.linear_bytes + plan.table_bytes + dense_bytes + text_bytes +
                      kHeaderPerLinear * static_cast<uint64_t>(kNLinears * c.n_layers);
  if (options.needs_calibration()) {
    // While a basis is learned, its state with both moments, which is replaced by writing another.
    plan.resume_bytes = std::max(plan.linear_bytes + dense_bytes + learned_bytes(options, c),
                                 6 * learned_bytes(options, c));
  }
  plan.memory_bytes = estimate_memory(options, c, layer_weights, layer_bytes, n_tokens);
  return plan;
}

void check_output_path(const std::string& output, const std::vector<std::string>& inputs,
                       bool force) {
  const auto refuse = [&](const std::string& why, const std::string& hint = "") {
    throw Error(ErrorKind::kIo, "cannot write output", output, why, hint);
  };
  if (output == "-") {
    throw Error(ErrorKind::kUsage, "usage", "-o -", "the output must be a file",
                "./- is the file of that name");
  }
  const std::string folder = parent_folder(output);
  struct stat info {};
  if (stat(folder.c_str(), &info) != 0) {
    refuse("folder " + folder + ": " + std::strerror(errno), "create it first");
  }
  if (!S_ISDIR(info.st_mode)) refuse(folder + " is not a folder");
  const std::string target = output_target(output, Replace::kAllowed);
  for (const std::string& input : inputs) {
    struct stat other {};
    if (stat(target.c_str(), &info) == 0 && stat(input.c_str(), &other) == 0 &&
        other.st_dev == info.st_dev && other.st_ino == info.st_ino) {
      refuse("it is the input " + input, "choose another name");
    }
  }
  if (!force) output_target(output, Replace::kNever);
  if (access(parent_folder(target).c_str(), W_OK | X_OK) != 0) {
    refuse("folder " + parent_folder(target) + ": " + std::strerror(errno));
  }
}

void check_disk_space(const std::string& output, uint64_t bytes) {
  struct statvfs info {};
  const std::string folder = parent_folder(output);
  if (statvfs(folder.c_str(), &info) != 0) {
    throw Error(ErrorKind::kIo, "cannot examine folder", folder, std::strerror(errno));
  }
  const uint64_t free_bytes = static_cast<uint64_t>(info.f_bavail) * info.f_frsize;
  if (free_bytes < bytes) {
    throw Error(ErrorKind::kIo, "not enough disk space", folder,
                "needs " + gigabytes(static_cast<double>(bytes)) + ", " +
                    gigabytes(static_cast<double>(free_bytes)) + " are free");
  }
}

void check_memory(uint64_t bytes) {
  const uint64_t available = available_memory();
  if (bytes <= available) return;
  throw Error(ErrorKind::kResource, "not enough memory", "host",
              "needs about " + gigabytes(static_cast<double>(bytes)) + ", " +
                  gigabytes(static_cast<double>(available)) + " are available",
              "lower --calib-samples, or use --method quarot --rounding rtn");
}

void for_each_matrix(const Model& model,
                     const std::function<void(const std::string&, const Matrix&)>& visit) {
  visit("tok_embed", model.tok_embed);
  if (!model.config.tied) visit("lm_head", model.lm_head.weight);
  for (size_t layer = 0; layer < model.layers.size(); ++layer) {
    for (const NamedLinear& linear : kLayerLinears) {
      visit("layers." + std::to_string(layer) + "." + linear.name,
            (model.layers[layer].*linear.member).weight);
    }
  }
}

uint64_t scan_weights(const Model& model, const std::function<void(const Matrix&)>& done_with) {
  uint64_t hash = 0;
  std::vector<float> row;
  const auto check = [&](const std::string& name, int64_t cols, int64_t n_rows,
                         const std::function<void(int64_t, float*)>& read) {
    int64_t n_bad = 0, first_bad = -1;
    row.resize(static_cast<size_t>(cols));
    for (int64_t r = 0; r < n_rows; ++r) {
      read(r, row.data());
      // 0 * x is 0 for every finite x and NaN otherwise; one test a row keeps this at memory speed.
      float zero = 0;
      for (float value : row) zero += 0.0f * value;
      if (zero == 0) continue;
      for (int64_t c = 0; c < cols; ++c) {
        if (std::isfinite(row[static_cast<size_t>(c)])) continue;
        if (n_bad++ == 0) first_bad = r * cols + c;
      }
    }
    if (n_bad == 0) return;
    throw Error(ErrorKind::kBadData, "weights are not finite", model.source,
                "tensor " + name + ": " + std::to_string(n_bad) + " values, the first at index " +
                    std::to_string(first_bad));
  };
  for_each_matrix(model, [&](const std::string& name, const Matrix& matrix) {
    check(name, matrix.cols, matrix.rows,
          [&](int64_t r, float* out) { matrix_row_f32(matrix, r, out); });
    hash = XXH3_64bits_withSeed(matrix.data, matrix.data_bytes(), hash);
    done_with(matrix);
  });
  const auto check_vector = [&](const std::string& name, const std::vector<float>& values) {
    check(name, static_cast<int64_t>(values.size()), 1,
          [&](int64_t, float* out) { std::copy(values.begin(), values.end(), out); });
    hash = XXH3_64bits_withSeed(values.data(), values.size() * sizeof(float), hash);
  };
  check_vector("final_norm", model.final_norm);
  for (size_t i = 0; i < model.layers.size(); ++i) {
    const std::string prefix = "layers." + std::to_string(i) + ".";
    check_vector(prefix + "attn_norm", model.layers[i].attn_norm);
    check_vector(prefix + "ffn_norm", model.layers[i].ffn_norm);
    check_vector(prefix + "q_norm", model.layers[i].q_norm);
    check_vector(prefix + "k_norm", model.layers[i].k_norm);
  }
  return hash;
}

}  // namespace tq
