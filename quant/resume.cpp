// resume - reading and writing of finished layers. See resume.h.
#include "quant/resume.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <new>
#include <string_view>
#include <vector>

#include "model/atomic_file.h"
#include "model/error.h"
#include "model/input_file.h"

namespace tq {
namespace {

constexpr char kMagic[8] = {'T', 'Q', 'L', 'A', 'Y', 'E', 'R', '3'};
constexpr const char* kFingerprintFile = "/fingerprint.json";
constexpr const char* kLearnedFile = "/learned.bin";
constexpr const char* kLearningFile = "/learning.bin";
constexpr size_t kMaxFingerprintBytes = 16u << 20;

// A file of finished work, written as it comes: states of a descent are larger than memory bears
// twice.
class FramedFile {
 public:
  FramedFile(const std::string& path, const Json& json)
      : file_(path), state_(XXH3_createState(), XXH3_freeState) {
    if (!state_) throw std::bad_alloc();
    XXH3_64bits_reset(state_.get());
    const std::string description = json.dump();
    const uint64_t length = description.size();
    append(kMagic, sizeof kMagic);
    append(&length, sizeof length);
    append(description.data(), description.size());
  }
  void append(const void* data, size_t bytes) {
    XXH3_64bits_update(state_.get(), data, bytes);
    file_.write(data, bytes);
  }
  void finish() {
    const uint64_t hash = XXH3_64bits_digest(state_.get());
    file_.write(&hash, sizeof hash);
    file_.finish();
  }

 private:
  AtomicFile file_;
  std::unique_ptr<XXH3_state_t, XXH_errorcode (*)(XXH3_state_t*)> state_;
};

// Collects arrays for the end of a file. They must live until then.
class LayerWriter {
 public:
  void append(const void* data, size_t bytes) {
    arrays_.emplace_back(static_cast<const char*>(data), bytes);
  }
  void write(const std::string& path, const Json& json) const {
    FramedFile file(path, json);
    for (const std::string_view array : arrays_) file.append(array.data(), array.size());
    file.finish();
  }
  Json vector(const std::vector<float>& values) {
    append(values.data(), values.size() * sizeof(float));
    return values.size();
  }
  Json matrix(const MatrixRM& m) {
    append(m.data(), static_cast<size_t>(m.size()) * sizeof(double));
    return {m.rows(), m.cols()};
  }
  Json matrix(const FloatMatrix& m) {
    append(m.data.data(), m.data.size() * sizeof(float));
    return {m.rows, m.cols};
  }
  Json matrix(const OwnedMatrix& m) {
    append(m.data.data(), m.data.size());
    append(m.scales.data(), m.scales.size() * 2);
    return {static_cast<int>(m.storage), m.rows, m.cols, m.group};
  }

 private:
  std::vector<std::string_view> arrays_;
};

class LayerReader {
 public:
  LayerReader(const std::string& path, std::string_view arrays) : path_(path), rest_(arrays) {}

  void take(void* out, size_t bytes) {
    if (bytes > rest_.size()) damaged("it ends early");
    if (bytes == 0) return;  // an empty vector has no address to copy to
    std::memcpy(out, rest_.data(), bytes);
    rest_.remove_prefix(bytes);
  }
  std::vector<float> vector(const Json& size) {
    const size_t count = size.get<size_t>();
    if (count > rest_.size() / sizeof(float)) damaged("it ends early");
    std::vector<float> values(count);
    take(values.data(), count * sizeof(float));
    return values;
  }
  MatrixRM double_matrix(const Json& json) {
    const auto [rows, cols] = shape(json, sizeof(double));
    MatrixRM m(rows, cols);
    take(m.data(), static_cast<size_t>(m.size()) * sizeof(double));
    return m;
  }
  FloatMatrix float_matrix(const Json& json) {
    const auto [rows, cols] = shape(json, sizeof(float));
    FloatMatrix m{rows, cols, std::vector<float>(static_cast<size_t>(rows * cols))};
    take(m.data.data(), m.data.size() * sizeof(float));
    return m;
  }
  OwnedMatrix matrix(const Json& json) {
    OwnedMatrix m;
    m.storage = static_cast<Storage>(json.at(0).get<int>());
    m.rows = json.at(1).get<int64_t>();
    m.cols = json.at(2).get<int64_t>();
    m.group = json.at(3).get<int64_t>();
    if (m.rows < 0 || m.cols < 0 || m.group < 0 || m.rows > INT32_MAX || m.cols > INT32_MAX ||
        m.view().data_bytes() > rest_.size()) {
      damaged("a matrix does not fit");
    }
    m.data.resize(m.view().data_bytes());
    take(m.data.data(), m.data.size());
    if (m.view().scale_bytes() > rest_.size()) damaged("a matrix does not fit");
    m.scales.resize(m.view().scale_bytes() / 2);
    take(m.scales.data(), m.scales.size() * 2);
    return m;
  }
  size_t bytes_left() const { return rest_.size(); }
  [[noreturn]] void damaged(const std::string& why) const {
    throw Error(ErrorKind::kBadData, "resume data is damaged", path_, why,
                "start again without --resume");
  }

 private:
  // Rows and columns that the rest of the file can hold.
  std::pair<int64_t, int64_t> shape(const Json& json, size_t element) {
    const int64_t rows = json.at(0).get<int64_t>(), cols = json.at(1).get<int64_t>();
    if (rows < 0 || cols < 0 || rows > INT32_MAX || cols > INT32_MAX ||
        static_cast<uint64_t>(rows * cols) > rest_.size() / element) {
      damaged("a matrix does not fit");
    }
    return {rows, cols};
  }
  const std::string& path_;
  std::string_view rest_;
};

Json write_linear(LayerWriter& writer, const OwnedLinear& linear) {
  Json json;
  json["weight"] = writer.matrix(linear.weight);
  if (linear.branch_a) {
    json["branch_a"] = writer.matrix(*linear.branch_a);
    json["branch_b"] = writer.matrix(*linear.branch_b);
  }
  json["transformed"] = linear.input.active();
  json["act"] = {linear.act.bits, linear.act.group, linear.act.clip,
                 static_cast<int>(linear.act.codes), linear.act.two_level};
  json["exponents"] = linear.exponents;
  return json;
}

// Null where there is none.
Json write_skip(LayerWriter& writer, const std::optional<OwnedLowRankStep>& skip) {
  if (!skip) return nullptr;
  const Json a = writer.matrix(skip->a);
  return {a, writer.matrix(skip->b)};
}

std::optional<OwnedLowRankStep> read_skip(LayerReader& reader, const Json& json) {
  if (json.is_null()) return std::nullopt;
  OwnedLowRankStep skip;
  skip.a = reader.matrix(json.at(0));
  skip.b = reader.matrix(json.at(1));
  return skip;
}

OwnedLinear read_linear(LayerReader& reader, const Json& json, const Transform& down) {
  OwnedLinear linear;
  linear.weight = reader.matrix(json.at("weight"));
  if (json.contains("branch_a")) {
    linear.branch_a = reader.matrix(json.at("branch_a"));
    linear.branch_b = reader.matrix(json.at("branch_b"));
  }
  if (json.at("transformed").get<bool>()) linear.input = down;
  linear.act.bits = json.at("act").at(0).get<int>();
  linear.act.group = json.at("act").at(1).get<int64_t>();
  linear.act.clip = json.at("act").at(2).get<float>();
  linear.act.codes = static_cast<ActCodes>(json.at("act").at(3).get<int>());
  linear.act.two_level = json.at("act").at(4).get<bool>();
  linear.exponents = json.at("exponents").get<std::vector<int8_t>>();
  return linear;
}

QuantizedLayer read_layer(const Json& json, LayerReader& reader, const Transform& down) {
  QuantizedLayer result;
  result.layer.attn_norm = reader.vector(json.at("attn_norm"));
  result.layer.ffn_norm = reader.vector(json.at("ffn_norm"));
  result.layer.q_norm = reader.vector(json.at("q_norm"));
  result.layer.k_norm = reader.vector(json.at("k_norm"));
  for (int i = 0; i < kNLinears; ++i) {
    const size_t index = static_cast<size_t>(i);
    result.layer.linears[index] = read_linear(reader, json.at("linears").at(index), down);
    result.reports.push_back(report_from_json(json.at("reports").at(index)));
  }
  result.layer.attn_skip = read_skip(reader, json.at("attn_skip"));
  result.layer.ffn_skip = read_skip(reader, json.at("ffn_skip"));
  return result;
}

// Checks a file and hands over its description and arrays; false if there is no such file.
// `binding` is what the file must be about.
template <typename Use>
bool read_framed(const std::string& path, const Json& binding, const Use& use) {
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) return false;
  const MappedFile file(path);
  const std::string_view bytes(reinterpret_cast<const char*>(file.data()), file.size());
  constexpr size_t kPrefix = sizeof kMagic + sizeof(uint64_t);
  LayerReader whole(path, bytes);
  uint64_t length = 0, hash = 0;
  if (bytes.size() < kPrefix + sizeof hash || !bytes.starts_with({kMagic, sizeof kMagic})) {
    whole.damaged("it is not a file of finished work");
  }
  std::memcpy(&length, bytes.data() + sizeof kMagic, sizeof length);
  const std::string_view body = bytes.substr(0, bytes.size() - sizeof hash);
  std::memcpy(&hash, bytes.data() + body.size(), sizeof hash);
  if (XXH3_64bits(body.data(), body.size()) != hash || length > body.size() - kPrefix) {
    whole.damaged("its checksum does not match");
  }
  const Json json = parse_json(body.substr(kPrefix, length), path);
  if (!json.contains("binding") || json.at("binding") != binding) {
    whole.damaged("it belongs to another layer or another run");
  }
  LayerReader reader(path, body.substr(kPrefix + length));
  try {
    use(json, reader);
  } catch (const Json::exception&) {
    reader.damaged("its description is incomplete");
  }
  return true;
}

class WritingArchive : public Archive {
 public:
  explicit WritingArchive(FramedFile& file) : file_(file) {}
  bool reading() const override { return false; }

 protected:
  void bytes(void* data, size_t count) override { file_.append(data, count); }
  size_t checked_count(uint64_t count, size_t) const override { return count; }

 private:
  FramedFile& file_;
};

class ReadingArchive : public Archive {
 public:
  explicit ReadingArchive(LayerReader& reader) : reader_(reader) {}
  bool reading() const override { return true; }

 protected:
  void bytes(void* data, size_t count) override { reader_.take(data, count); }
  size_t checked_count(uint64_t count, size_t element_bytes) const override {
    if (count > reader_.bytes_left() / element_bytes) reader_.damaged("it ends early");
    return count;
  }

 private:
  LayerReader& reader_;
};

bool is_ours(const std::string& name) {
  return name.starts_with("layer-") || name.starts_with("learned.bin") ||
         name.starts_with("learning.bin") || name.starts_with("fingerprint.json");
}

void remove_file(const std::string& path) {
  std::error_code ignored;
  std::filesystem::remove(path, ignored);
}

}  // namespace

ResumeStore::ResumeStore(const std::string& output) : folder_(output + ".resume") {}

ResumeStore::~ResumeStore() {
  if (fd_ < 0) return;
  try {
    if (contents().empty()) remove();  // however the run ended
  } catch (...) {
    // Out of memory: then the folder stays.
  }
  ::close(fd_);
}

bool ResumeStore::exists() const {
  std::error_code ignored;
  return std::filesystem::exists(folder_ + kFingerprintFile, ignored);
}

// The folder may go between the steps of this: the run that had it was just finishing.
void ResumeStore::lock() {
  while (fd_ < 0) {
    if (::mkdir(folder_.c_str(), 0777) != 0 && errno != EEXIST) {
      throw Error(ErrorKind::kIo, "cannot create folder", folder_, std::strerror(errno));
    }
    const int fd = ::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT) continue;
    if (fd < 0) throw Error(ErrorKind::kIo, "cannot open folder", folder_, std::strerror(errno));
    const bool locked = lock_descriptor(fd, false);
    if (locked && still_named(fd, folder_)) {
      fd_ = fd;
      return;
    }
    ::close(fd);
    if (!locked) {
      throw Error(ErrorKind::kIo, "output is being made", folder_,
                  "another tq works in this folder",
                  "wait until it has ended, or choose another output");
    }
  }
}

void ResumeStore::refuse_second_run(const std::string& output) {
  const std::string folder = output + ".resume";
  std::error_code ignored;
  if (std::filesystem::is_directory(folder, ignored)) ResumeStore(output).lock();
}

uint64_t ResumeStore::held_bytes(const std::string& output) {
  uint64_t bytes = 0;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(output + ".resume", ignored)) {
    if (!is_ours(entry.path().filename().string())) continue;
    const uint64_t size = entry.file_size(ignored);
    if (!ignored) bytes += size;
  }
  return bytes;
}

void ResumeStore::bind(const Json& fingerprint) {
  const std::string text = fingerprint.dump();
  char hash[17];
  std::snprintf(hash, sizeof hash, "%016llx",
                static_cast<unsigned long long>(XXH3_64bits(text.data(), text.size())));
  run_ = hash;
}

Json ResumeStore::binding(const std::string& what) const {
  return {{"run", run_}, {"what", what}};
}

void ResumeStore::check(const Json& fingerprint) {
  lock();
  const std::string path = folder_ + kFingerprintFile;
  const Json stored = parse_json(read_text_file(path, kMaxFingerprintBytes), path);
  const auto mismatch = [&](const std::string& field) {
    throw Error(ErrorKind::kBadData, "resume data does not match: " + field, folder_,
                "it was made with another model, other options or another calibration text",
                "run with the original options, or without --resume to start again");
  };
  if (!stored.is_object()) mismatch("fingerprint");
  for (const auto& item : fingerprint.items()) {
    if (!stored.contains(item.key()) || stored.at(item.key()) != item.value()) mismatch(item.key());
  }
  for (const auto& item : stored.items()) {
    if (!fingerprint.contains(item.key())) mismatch(item.key());
  }
  bind(fingerprint);
}

void ResumeStore::create(const Json& fingerprint) {
  lock();
  remove_files();
  write_text_file(folder_ + kFingerprintFile, fingerprint.dump(2) + "\n");
  bind(fingerprint);
}

std::string ResumeStore::layer_name(int64_t layer) {
  char name[32];
  std::snprintf(name, sizeof name, "/layer-%05d.bin", static_cast<int>(layer));
  return name;
}

void ResumeStore::save(int64_t layer, const QuantizedLayer& result) const {
  LayerWriter writer;
  Json json = {{"binding", binding(layer_name(layer))}};
  json["attn_norm"] = writer.vector(result.layer.attn_norm);
  json["ffn_norm"] = writer.vector(result.layer.ffn_norm);
  json["q_norm"] = writer.vector(result.layer.q_norm);
  json["k_norm"] = writer.vector(result.layer.k_norm);
  for (const OwnedLinear& linear : result.layer.linears) {
    json["linears"].push_back(write_linear(writer, linear));
  }
  json["attn_skip"] = write_skip(writer, result.layer.attn_skip);
  json["ffn_skip"] = write_skip(writer, result.layer.ffn_skip);
  for (const LinearReport& report : result.reports) json["reports"].push_back(to_json(report));
  writer.write(folder_ + layer_name(layer), json);
}

std::optional<QuantizedLayer> ResumeStore::load(int64_t layer, const Transform& down) const {
  std::optional<QuantizedLayer> result;
  const std::string name = layer_name(layer);
  read_framed(folder_ + name, binding(name), [&](const Json& json, LayerReader& reader) {
    result = read_layer(json, reader, down);
  });
  return result;
}

void ResumeStore::save_learned(const LearnResult& learned) const {
  LayerWriter writer;
  Json json = {{"binding", binding(kLearnedFile)},
               {"losses", learned.losses},
               {"orthogonality_error", learned.orthogonality_error}};
  json["residual"] = json["heads"] = json["branches"] = Json::array();
  for (const MatrixRM& m : learned.basis.residual) json["residual"].push_back(writer.matrix(m));
  for (const MatrixRM& m : learned.basis.heads) json["heads"].push_back(writer.matrix(m));
  for (const auto& layer : learned.basis.branches) {
    for (const LowRank& branch : layer) {
      const Json a = writer.matrix(branch.a);
      json["branches"].push_back({a, writer.matrix(branch.b)});
    }
  }
  writer.write(folder_ + kLearnedFile, json);
  remove_file(folder_ + kLearningFile);
}

std::optional<LearnResult> ResumeStore::load_learned() const {
  std::optional<LearnResult> result;
  const std::string path = folder_ + kLearnedFile;
  read_framed(path, binding(kLearnedFile), [&](const Json& json, LayerReader& reader) {
    result.emplace();
    result->losses = json.at("losses").get<std::vector<double>>();
    result->orthogonality_error = json.at("orthogonality_error").get<double>();
    LearnedBasis& basis = result->basis;
    for (const Json& m : json.at("residual")) basis.residual.push_back(reader.double_matrix(m));
    for (const Json& m : json.at("heads")) basis.heads.push_back(reader.double_matrix(m));
    const Json& branches = json.at("branches");
    for (size_t i = 0; i < branches.size(); ++i) {
      if (i % kNLinears == 0) basis.branches.emplace_back();
      LowRank& branch = basis.branches.back()[i % kNLinears];
      branch.a = reader.float_matrix(branches[i].at(0));
      branch.b = reader.float_matrix(branches[i].at(1));
    }
  });
  return result;
}

void ResumeStore::save_learning(const Transfer& transfer) const {
  FramedFile file(folder_ + kLearningFile, {{"binding", binding(kLearningFile)}});
  WritingArchive archive(file);
  transfer(archive);
  file.finish();
}

bool ResumeStore::check_learning() const {
  return read_framed(folder_ + kLearningFile, binding(kLearningFile),
                     [](const Json&, LayerReader&) {});
}

void ResumeStore::load_learning(const Transfer& transfer) const {
  read_framed(folder_ + kLearningFile, binding(kLearningFile),
              [&](const Json&, LayerReader& reader) {
                ReadingArchive archive(reader);
                transfer(archive);
                if (reader.bytes_left() > 0) reader.damaged("it holds more than a state");
              });
}

std::string ResumeStore::contents() const {
  int64_t n_layers = 0;
  bool learned = false, learning = false;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder_, ignored)) {
    const std::string name = entry.path().filename().string();
    n_layers += name.starts_with("layer-") && name.ends_with(".bin");
    learned = learned || name == kLearnedFile + 1;
    learning = learning || name == kLearningFile + 1;
  }
  std::string text = learned ? "the learned basis" : learning ? "the basis as learned so far" : "";
  if (n_layers == 0) return text;
  return (learned ? text + " and " : "") +
         (n_layers == 1 ? "1 finished layer" : std::to_string(n_layers) + " finished layers");
}

void ResumeStore::remove_files() const {
  // Only what we wrote: the folder's name is ours, but a user may have put something there. Also
  // without a fingerprint: layers left by a removal that was cut short must not look finished.
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder_, ignored)) {
    if (is_ours(entry.path().filename().string())) remove_file(entry.path().string());
  }
}

void ResumeStore::remove() const {
  remove_files();
  std::error_code ignored;
  std::filesystem::remove(folder_, ignored);  // fails, rightly, when something else is in it
}

}  // namespace tq
