// cmd_inspect - `tq inspect` (what is in a model) and `tq verify` (is every byte as written).
#include <cmath>
#include <cstdio>

#include "model/error.h"
#include "model/tq_file.h"
#include "quant/distortion.h"
#include "tokenizer/chat.h"
#include "tools/commands.h"
#include "tools/runtime.h"

namespace tq {
namespace {

const char* matrix_storage_name(const Matrix& matrix) {
  switch (matrix.storage) {
    case Storage::kF32:
      return "f32";
    case Storage::kF16:
      return "f16";
    case Storage::kBF16:
      return "bf16";
    case Storage::kQ4:
      return "q4";
    case Storage::kQ8:
      return "q8";
  }
  return "?";
}

Json matrix_json(const std::string& name, const Matrix& matrix, uint64_t bytes) {
  const double params = static_cast<double>(matrix.rows) * static_cast<double>(matrix.cols);
  Json json = {{"name", name},
               {"shape", {matrix.rows, matrix.cols}},
               {"storage", matrix_storage_name(matrix)},
               {"bytes", bytes},
               {"bits_per_weight", static_cast<double>(bytes) * 8 / params}};
  if (matrix.packed()) json["group"] = matrix.group;
  return json;
}

// One row per linear. Distortion was measured while quantizing and travels in the header.
Json linear_json(const std::string& name, const Linear& linear, const Json& measured) {
  Json json = matrix_json(name, linear.weight, linear.n_bytes());
  json["rank"] = linear.rank();
  json["act_bits"] = linear.act.bits;
  if (linear.act.bits < 16) {
    json["act_group"] = linear.act.group;
    json["act_clip"] = linear.act.clip;
    json["act_full_range"] = linear.act.codes == ActCodes::kAll;
    if (linear.act.codes == ActCodes::kAsymmetric) json["act_asymmetric"] = true;
    if (linear.act.two_level) json["act_two_level"] = true;
  }
  if (linear.input.active()) json["input_transform_block"] = linear.input.block;
  if (measured.contains(name) && measured[name].is_object()) json["distortion"] = measured[name];
  return json;
}

Json basis_json(const Transform& basis) {
  if (!basis.active()) return nullptr;
  if (basis.kind == Transform::Kind::kDense) {
    return {{"kind", "dense"}, {"storage", matrix_storage_name(basis.matrix)}};
  }
  return {{"kind", "hadamard"}, {"block", basis.block}};
}

const char* rope_name(RopeKind kind) {
  switch (kind) {
    case RopeKind::kDefault:
      return "default";
    case RopeKind::kLlama3:
      return "llama3";
    case RopeKind::kYarn:
      return "yarn";
  }
  return "?";
}

Json inspect_json(const Model& model, const Tokenizer& tokenizer) {
  const Config& c = model.config;
  const Json measured = model.quantization.value("distortion", Json::object());
  Json tensors = Json::array();
  tensors.push_back(matrix_json("tok_embed", model.tok_embed, model.tok_embed.n_bytes()));
  uint64_t linear_params = 0, linears_bytes = 0, other = 0;
  // What changes of basis take in the file, beside the linears.
  uint64_t basis_bytes =
      transform_bytes(model.residual_basis) + transform_bytes(model.output_basis);
  for (size_t i = 0; i < model.layers.size(); ++i) {
    const Layer& layer = model.layers[i];
    for (const NamedLinear& named : kLayerLinears) {
      const Linear& linear = layer.*named.member;
      tensors.push_back(
          linear_json("layers." + std::to_string(i) + "." + named.name, linear, measured));
      linear_params += static_cast<uint64_t>(linear.out_dim() * linear.in_dim());
      linears_bytes += linear.n_bytes();
      basis_bytes += transform_bytes(linear.input);
    }
    for (const NamedSkip& named : kLayerSkips) {
      const auto& skip = layer.*named.member;
      if (!skip) continue;
      const std::string name = "layers." + std::to_string(i) + "." + named.name;
      tensors.push_back(matrix_json(name + ".a", skip->a, skip->a.n_bytes()));
      tensors.push_back(matrix_json(name + ".b", skip->b, skip->b.n_bytes()));
    }
    basis_bytes += skip_bytes(layer);
    other +=
        layer.attn_norm.size() + layer.ffn_norm.size() + layer.q_norm.size() + layer.k_norm.size();
  }
  if (!c.tied) {
    tensors.push_back(matrix_json("lm_head", model.lm_head.weight, model.lm_head.n_bytes()));
  }
  const uint64_t table = static_cast<uint64_t>(c.vocab_size * c.dim);
  const uint64_t params =
      linear_params + other + static_cast<uint64_t>(c.dim) + table * (c.tied ? 1 : 2);
  const uint64_t total_bytes = linears_bytes + basis_bytes + model.tok_embed.n_bytes() +
                               (c.tied ? 0 : model.lm_head.n_bytes()) +
                               4 * (other + static_cast<uint64_t>(c.dim));
  Json kv_bytes;
  for (int bits : {32, 16, 8, 4}) kv_bytes[std::to_string(bits)] = kv_token_bytes(c, bits);
  Json quantization = model.quantization;
  quantization.erase("distortion");  // shown per tensor
  return {{"schema", 1},
          {"source", model.source},
          {"architecture", c.arch == Arch::kLlama ? "llama" : "qwen3"},
          {"parameters", params},
          {"weight_bytes", total_bytes},
          {"bits_per_weight", 8.0 * static_cast<double>(total_bytes) / static_cast<double>(params)},
          {"linears",
           {{"parameters", linear_params},
            {"bytes", linears_bytes},
            {"basis_bytes", basis_bytes},
            {"bits_per_weight", 8.0 * static_cast<double>(linears_bytes + basis_bytes) /
                                    static_cast<double>(linear_params)}}},
          {"shape",
           {{"dim", c.dim},
            {"hidden_dim", c.hidden_dim},
            {"n_layers", c.n_layers},
            {"n_heads", c.n_heads},
            {"n_kv_heads", c.n_kv_heads},
            {"head_dim", c.head_dim},
            {"vocab_size", c.vocab_size},
            {"max_seq_len", c.max_seq_len},
            {"norm_eps", c.norm_eps},
            {"tied_embeddings", c.tied}}},
          {"rope",
           {{"type", rope_name(c.rope.kind)}, {"theta", c.rope.theta}, {"factor", c.rope.factor}}},
          {"residual_basis", basis_json(model.residual_basis)},
          {"quantization", quantization},
          {"kv_bits", model.kv_bits},
          {"kv_bytes_per_token", kv_bytes},
          {"tokenizer", {{"type", tokenizer.describe()}, {"size", tokenizer.size()}}},
          {"chat_template", chat_kind_name(detect_chat_kind(model.texts, model.source))},
          {"stop_tokens", stop_tokens(model.texts, c, tokenizer, model.source)},
          {"tensors", tensors}};
}

void print_summary(const Json& json) {
  const Json& shape = json["shape"];
  std::string out;
  char line[256];
  const auto add = [&](const char* format, auto... values) {
    std::snprintf(line, sizeof line, format, values...);
    out += line;
  };
  out += printable(json["source"].get<std::string>()) + "\n";
  add("  %s, %.1f M parameters, %.1f MB of weights, %.3f bits per weight\n",
      json["architecture"].get<std::string>().c_str(), json["parameters"].get<double>() / 1e6,
      json["weight_bytes"].get<double>() / 1e6, json["bits_per_weight"].get<double>());
  add("  linears: %.1f M parameters, %.4f bits per weight (scales, branches and %.1f KB of bases "
      "included)\n",
      json["linears"]["parameters"].get<double>() / 1e6,
      json["linears"]["bits_per_weight"].get<double>(),
      json["linears"]["basis_bytes"].get<double>() / 1e3);
  add("  dim %lld, hidden %lld, layers %lld, heads %lld (kv %lld) of %lld, vocab %lld, context "
      "%lld\n",
      shape["dim"].get<long long>(), shape["hidden_dim"].get<long long>(),
      shape["n_layers"].get<long long>(), shape["n_heads"].get<long long>(),
      shape["n_kv_heads"].get<long long>(), shape["head_dim"].get<long long>(),
      shape["vocab_size"].get<long long>(), shape["max_seq_len"].get<long long>());
  const int kv_bits = json["kv_bits"].get<int>();
  add("  rope %s, theta %.0f; KV cache %lld bytes a token at %d bits\n",
      json["rope"]["type"].get<std::string>().c_str(), json["rope"]["theta"].get<double>(),
      json["kv_bytes_per_token"][std::to_string(kv_bits)].get<long long>(), kv_bits);
  add("  tokenizer %s; chat template %s\n", json["tokenizer"]["type"].get<std::string>().c_str(),
      json["chat_template"].get<std::string>().c_str());
  out += "  quantization " + printable(json["quantization"].value("method", "none")) + "\n\n";
  add("  %-22s %14s %6s %6s %6s %8s %8s\n", "tensor", "shape", "store", "group", "rank", "bits/w",
      "SNR dB");
  bool any_before = false;
  for (const Json& tensor : json["tensors"]) {
    char dims[32];
    std::snprintf(dims, sizeof dims, "%lld x %lld", tensor["shape"][0].get<long long>(),
                  tensor["shape"][1].get<long long>());
    std::string snr = "-";
    Json measured = tensor.value("distortion", Json::object());
    const bool before = measured.contains("before_refinement");
    if (before) measured = Json(measured["before_refinement"]);
    if (measured.contains("weight_snr_db")) {
      const Json& db = measured["weight_snr_db"];  // null: exact
      snr = decibels(db.is_number() ? db.get<double>() : INFINITY) + (before ? "*" : "");
      any_before = any_before || before;
    }
    add("  %-22s %14s %6s %6lld %6lld %8.4f %8s\n", tensor["name"].get<std::string>().c_str(), dims,
        tensor["storage"].get<std::string>().c_str(), tensor.value("group", 0LL),
        tensor.value("rank", 0LL), tensor["bits_per_weight"].get<double>(), snr.c_str());
  }
  if (any_before) add("  %s\n", "* of the scales as rounded; refining them changed what is stored");
  write_result(out);
}

}  // namespace

void add_inspect_command(CLI::App& app) {
  struct Options {
    std::string model;
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("inspect", "shapes, sizes and bits per weight of a model");
  command->add_option("model", options->model, ".tq file or Hugging Face folder")->required();
  command->add_flag("--json", options->json, "one JSON object on stdout");
  command->callback([options] {
    const Model model = load_model(options->model, Verify::kTexts);
    const Tokenizer tokenizer = open_tokenizer(model);
    print_notes(model, tokenizer);
    const Json json = inspect_json(model, tokenizer);
    if (options->json) {
      write_json(json, 2);
    } else {
      print_summary(json);
    }
  });
}

void add_verify_command(CLI::App& app) {
  auto path = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand("verify", "check every checksum of a .tq file");
  command->add_option("model", *path, ".tq file")->required();
  command->callback([path] {
    const int64_t count = verify_tq_file(*path);
    write_result("ok: " + std::to_string(count) + " tensors of " + printable(*path) +
                 " are as written\n");
  });
}

}  // namespace tq
