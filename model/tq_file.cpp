// tq_file - writing and verifying .tq files; reading is in tq_reader.cpp. Layout: docs/format.md.
#include "model/tq_file.h"

#include <xxhash.h>

#include <cstddef>

#include "model/error.h"
#include "model/tq_layout.h"

namespace tq {

namespace {

Json describe_matrix(const std::string& tensor, const Matrix& matrix) {
  Json json = {{"tensor", tensor},
               {"storage", storage_name(matrix.storage)},
               {"rows", matrix.rows},
               {"cols", matrix.cols}};
  if (matrix.packed()) json["group"] = matrix.group;
  return json;
}

}  // namespace

TqWriter::TqWriter(const std::string& path, Replace replace) : file_(path, replace) {
  const TqPrologue empty{};  // all zero: an unfinished file has no magic
  file_.write(&empty, sizeof empty);
}

void TqWriter::pad_to_alignment() {
  static const char zeros[kTqAlignment] = {};
  file_.write(zeros, (kTqAlignment - file_.size() % kTqAlignment) % kTqAlignment);
}

void TqWriter::add(const std::string& name, const std::string& dtype,
                   const std::vector<int64_t>& shape, std::span<const std::byte> data) {
  pad_to_alignment();
  tensors_.push_back({{"name", name},
                      {"dtype", dtype},
                      {"shape", shape},
                      {"offset", file_.size()},
                      {"bytes", data.size()},
                      {"xxh3", hash_text(XXH3_64bits(data.data(), data.size()))}});
  file_.write(data.data(), data.size());
}

void TqWriter::add_f32(const std::string& name, std::span<const float> values) {
  add(name, "F32", {static_cast<int64_t>(values.size())}, std::as_bytes(values));
}

void TqWriter::add_matrix(const std::string& name, const Matrix& matrix) {
  add(name, storage_name(matrix.storage), {matrix.rows, matrix.cols},
      {matrix.data, matrix.data_bytes()});
  if (!matrix.packed()) return;
  add(name + ".scales", "F16", {matrix.rows, matrix.n_groups()},
      {reinterpret_cast<const std::byte*>(matrix.scales), matrix.scale_bytes()});
}

Json TqWriter::describe_transform(const std::string& name, const Transform& transform) {
  if (transform.kind == Transform::Kind::kDense) {
    add_matrix(name + ".matrix", transform.matrix);
    return {{"kind", "dense"},
            {"size", transform.size},
            {"matrix", describe_matrix(name + ".matrix", transform.matrix)}};
  }
  Json json = {{"kind", "hadamard"}, {"size", transform.size}, {"block", transform.block}};
  json["signs"] = transform.signs != nullptr;
  if (transform.signs) {
    add(name + ".signs", "I8", {transform.size},
        {reinterpret_cast<const std::byte*>(transform.signs), static_cast<size_t>(transform.size)});
  }
  return json;
}

void TqWriter::add_table(const Matrix& table) {
  add_matrix("tok_embed", table);
  linears_["tok_embed"]["weight"] = describe_matrix("tok_embed", table);
}

void TqWriter::add_linear(const std::string& name, const Linear& linear, bool tied) {
  Json json;
  if (!tied) add_matrix(name, linear.weight);
  json["weight"] = describe_matrix(tied ? "tok_embed" : name, linear.weight);
  if (linear.branch_a) {
    TQ_CHECK(linear.branch_b.has_value());
    add_matrix(name + ".branch_a", *linear.branch_a);
    add_matrix(name + ".branch_b", *linear.branch_b);
    json["branch_a"] = describe_matrix(name + ".branch_a", *linear.branch_a);
    json["branch_b"] = describe_matrix(name + ".branch_b", *linear.branch_b);
  }
  TQ_CHECK(linear.input.kind != Transform::Kind::kDense, "only the residual basis may be dense");
  if (linear.input.active()) json["input"] = describe_transform(name + ".input", linear.input);
  json["act"] = {{"bits", linear.act.bits}};
  if (linear.act.bits < 16) {
    json["act"]["group"] = linear.act.group;
    json["act"]["clip"] = linear.act.clip;
    if (linear.act.codes == ActCodes::kAll) json["act"]["full_range"] = true;
    if (linear.act.codes == ActCodes::kAsymmetric) {
      json["act"]["asymmetric"] = true;
      version_ = std::max(version_, 3u);
    }
    const int64_t group = linear.act.group;
    if (group != 32 && group != 64 && group != 128) version_ = std::max(version_, 3u);
    if (linear.act.two_level) {
      json["act"]["two_level"] = true;
      version_ = std::max(version_, 4u);
    }
  }
  if (linear.exponents) {
    json["exponents"] = true;
    const size_t n = static_cast<size_t>(linear.out_dim());
    add(name + ".exponents", "I8", {linear.out_dim()},
        std::as_bytes(std::span(linear.exponents, n)));
    version_ = std::max(version_, 5u);
  }
  linears_[name] = std::move(json);
}

void TqWriter::add_residual_basis(const Transform& transform) {
  residual_basis_ = describe_transform("residual_basis", transform);
}

void TqWriter::add_output_basis(const Transform& transform) {
  output_basis_ = describe_transform("output_basis", transform);
}

void TqWriter::add_skip(const std::string& name, const LowRankStep& skip) {
  add_matrix(name + ".a", skip.a);
  add_matrix(name + ".b", skip.b);
  skips_[name] = {{"a", describe_matrix(name + ".a", skip.a)},
                  {"b", describe_matrix(name + ".b", skip.b)}};
}

void TqWriter::finish(const ModelTexts& texts, const Json& quantization,
                      const std::function<void(const std::string& path)>& check) {
  for (const NamedText& text : kModelTexts) {
    const std::string& value = texts.*text.member;
    if (value.empty()) continue;
    add(std::string("text.") + text.name, "U8", {static_cast<int64_t>(value.size())},
        std::as_bytes(std::span(value)));
  }
  Json header = {{"tq_format", version_}, {"quantization", quantization}};
  if (!residual_basis_.is_null()) header["residual_basis"] = residual_basis_;
  if (!output_basis_.is_null()) header["output_basis"] = output_basis_;
  header["linears"] = std::move(linears_);
  if (!skips_.is_null()) header["skips"] = std::move(skips_);
  if (kv_bits_ != 16) header["kv"] = {{"bits", kv_bits_}};
  header["tensors"] = std::move(tensors_);
  pad_to_alignment();
  const std::string text = header.dump();
  TqPrologue prologue{};
  std::memcpy(prologue.magic, kTqMagic, sizeof prologue.magic);
  prologue.version = version_;
  prologue.byte_order = kTqByteOrder;
  prologue.header_offset = file_.size();
  prologue.header_bytes = text.size();
  prologue.header_hash = XXH3_64bits(text.data(), text.size());
  prologue.file_bytes = file_.size() + text.size();
  prologue.prologue_hash = XXH3_64bits(&prologue, offsetof(TqPrologue, prologue_hash));
  file_.write(text.data(), text.size());
  file_.write_at(0, &prologue, sizeof prologue);
  if (check) check(file_.temp_path());
  file_.finish();
}

int64_t verify_tq_file(const std::string& path) {
  load_tq_file(path, Verify::kAll);
  const MappedFile file(path);
  return static_cast<int64_t>(read_tq_layout(file).tensors.size());
}

}  // namespace tq
