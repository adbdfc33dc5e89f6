// cli - runs the tq binary as a user does, and builds broken model folders for it.
#pragma once

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "model/json.h"
#include "tests/temp_dir.h"

namespace tq {

struct CliResult {
  int exit_code = -1;  // 128 + signal when killed
  std::string out, err;
  double max_rss_mb = 0, cpu_seconds = 0;  // unlike the clock, the same on a busy machine
};

struct CliOptions {
  std::string stdin_text = {};
  std::string stdout_path = {};  // instead of capturing
  rlim_t file_size_limit = 0;    // bytes, 0 = none
  rlim_t memory_limit = 0;       // address space, bytes, 0 = none
};

/// Runs TQ_BINARY with `args`; everything it prints is captured through files in `dir`.
inline CliResult run_tq(const TempDir& dir, const std::vector<std::string>& args,
                        const CliOptions& options = {}) {
  const std::string in = dir / ".stdin", out = dir / ".stdout", err = dir / ".stderr";
  write_bytes(in, options.stdin_text);
  const pid_t child = ::fork();
  if (child == 0) {
    const auto redirect = [](const std::string& path, int flags, int to) {
      ::dup2(::open(path.c_str(), flags, 0600), to);
    };
    redirect(in, O_RDONLY, 0);
    redirect(options.stdout_path.empty() ? out : options.stdout_path, O_WRONLY | O_CREAT | O_TRUNC,
             1);
    redirect(err, O_WRONLY | O_CREAT | O_TRUNC, 2);
    if (options.file_size_limit) {
      // The limit counts for the captured output too, which stays far below it.
      const rlimit limit = {options.file_size_limit, options.file_size_limit};
      ::setrlimit(RLIMIT_FSIZE, &limit);
      ::signal(SIGXFSZ, SIG_IGN);
    }
    if (options.memory_limit) {
      const rlimit limit = {options.memory_limit, options.memory_limit};
      ::setrlimit(RLIMIT_AS, &limit);
    }
    std::vector<char*> argv = {const_cast<char*>(TQ_BINARY)};
    for (const std::string& arg : args) argv.push_back(const_cast<char*>(arg.c_str()));
    argv.push_back(nullptr);
    ::execv(TQ_BINARY, argv.data());
    ::_exit(127);
  }
  int status = 0;
  rusage usage = {};
  ::wait4(child, &status, 0, &usage);
  CliResult result;
  result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  if (options.stdout_path.empty()) result.out = read_bytes(out);
  result.err = read_bytes(err);
  result.max_rss_mb = static_cast<double>(usage.ru_maxrss) / 1024;
  for (const timeval& time : {usage.ru_utime, usage.ru_stime}) {
    result.cpu_seconds +=
        static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  }
  for (const std::string& file : {in, out, err}) std::filesystem::remove(file);
  return result;
}

/// A copy of the stories260k fixture under DIR/model.
inline std::string copy_model(const TempDir& dir, const std::string& name = "model") {
  const std::string folder = dir / name;
  std::filesystem::create_directory(folder);
  for (const char* file : {"config.json", "generation_config.json", "model.safetensors",
                           "tokenizer.json", "tokenizer_config.json"}) {
    std::filesystem::copy_file(std::string(TQ_FIXTURES) + "/stories260k/" + file,
                               folder + "/" + file);
  }
  return folder;
}

inline void edit_json(const std::string& path, const std::function<void(Json&)>& edit) {
  Json json = Json::parse(read_bytes(path));
  edit(json);
  write_bytes(path, json.dump());
}

/// The two parts of a safetensors file.
struct Safetensors {
  Json header;
  std::string data;

  static Safetensors read(const std::string& path) {
    const std::string bytes = read_bytes(path);
    uint64_t n = 0;
    std::memcpy(&n, bytes.data(), 8);
    return {Json::parse(bytes.substr(8, n)), bytes.substr(8 + n)};
  }
  static void write(const std::string& path, const std::string& header, const std::string& data) {
    const uint64_t n = header.size();
    write_bytes(path, std::string(reinterpret_cast<const char*>(&n), 8) + header + data);
  }
  void write(const std::string& path) const { write(path, header.dump(), data); }
};

using Args = std::vector<std::string>;

inline Args logits_of(const TempDir& dir, const std::string& model) {
  return {"logits", model, "--ids", "1,2,3", "-o", dir / "out.npy"};
}

// Two shards with an index, from the single file: tensors of layers 0-1 and the rest.
inline std::string shard_model(const TempDir& dir, const std::string& name = "sharded") {
  const std::string model = copy_model(dir, name);
  const Safetensors all = Safetensors::read(model + "/model.safetensors");
  Safetensors shards[2];
  Json map = Json::object();
  for (const auto& item : all.header.items()) {
    if (item.key() == "__metadata__") continue;
    const bool second = item.key().find("layers.0.") == std::string::npos &&
                        item.key().find("layers.1.") == std::string::npos;
    Safetensors& shard = shards[second];
    const size_t begin = item.value()["data_offsets"][0], end = item.value()["data_offsets"][1];
    shard.header[item.key()] = item.value();
    shard.header[item.key()]["data_offsets"] = {shard.data.size(), shard.data.size() + end - begin};
    shard.data += all.data.substr(begin, end - begin);
    map[item.key()] =
        second ? "model-00002-of-00002.safetensors" : "model-00001-of-00002.safetensors";
  }
  shards[0].write(model + "/model-00001-of-00002.safetensors");
  shards[1].write(model + "/model-00002-of-00002.safetensors");
  write_bytes(model + "/model.safetensors.index.json",
              Json{{"metadata", {{"total_size", 1}}}, {"weight_map", map}}.dump());
  std::filesystem::remove(model + "/model.safetensors");
  return model;
}

// A quantized stories260k, made once.
inline const std::string& tq_bytes() {
  static const std::string bytes = [] {
    TempDir dir;
    const CliResult result =
        run_tq(dir, {"quantize", copy_model(dir), "-o", dir / "m.tq", "--method", "rtn", "-q"});
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return read_bytes(dir / "m.tq");
  }();
  return bytes;
}

inline void set_f32(Safetensors& weights, const std::string& name, size_t index, float value) {
  const size_t begin = weights.header[name]["data_offsets"][0];
  std::memcpy(weights.data.data() + begin + 4 * index, &value, 4);
}

}  // namespace tq
