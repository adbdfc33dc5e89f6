// test_folder_files - what stands in the place of a model's files: Git LFS pointers, pipes, links;
// and what lies beside them: adapters, other weights.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "model/input_file.h"
#include "model/json.h"
#include "model/weights.h"
#include "tests/cli.h"
#include "tests/expect_error.h"

namespace tq {
namespace {

namespace fs = std::filesystem;

const std::string kPointer =
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 12345\n";

TEST(FolderFiles, ALfsPointerIsNamedWhereverItStands) {
  for (const char* name : {"config.json", "generation_config.json", "model.safetensors",
                           "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}) {
    TempDir dir;
    const std::string model = copy_model(dir);
    write_bytes(model + "/" + name, kPointer);
    expect_error(ErrorKind::kBadData, {name, "Git LFS", "git lfs pull"},
                 [&] { load_hf_folder(model); });
  }
  for (const char* name : {"model.safetensors.index.json", "model-00002-of-00002.safetensors"}) {
    TempDir dir;
    const std::string model = shard_model(dir);
    write_bytes(model + "/" + name, kPointer);
    expect_error(ErrorKind::kBadData, {name, "Git LFS"}, [&] { load_hf_folder(model); });
  }
  TempDir dir;
  write_bytes(dir / "m.tq", kPointer);
  expect_error(ErrorKind::kBadData, {"m.tq", "Git LFS"}, [&] { load_model(dir / "m.tq"); });
  expect_error(ErrorKind::kBadData, {"m.tq", "Git LFS"}, [&] { load_tq_file(dir / "m.tq"); });
  expect_error(ErrorKind::kBadData, {"m.tq", "Git LFS"}, [&] { load_hf_folder(dir / "m.tq"); });
}

TEST(FolderFiles, PipesAreRefusedAndNotWaitedFor) {
  for (const char* name : {"config.json", "generation_config.json", "model.safetensors",
                           "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}) {
    TempDir dir;
    const std::string model = copy_model(dir);
    fs::remove(model + "/" + name);
    ::mkfifo((model + "/" + name).c_str(), 0600);
    expect_error(ErrorKind::kIo, {name, "it is a pipe"}, [&] { load_hf_folder(model); });
  }
  TempDir dir;
  const std::string model = shard_model(dir);
  for (const char* name : {"model-00002-of-00002.safetensors", "model.safetensors.index.json"}) {
    fs::remove(model + "/" + name);
    ::mkfifo((model + "/" + name).c_str(), 0600);
    expect_error(ErrorKind::kIo, {name, "it is a pipe"}, [&] { load_hf_folder(model); });
  }
  ::mkfifo((dir / "m.tq").c_str(), 0600);
  expect_error(ErrorKind::kIo, {"m.tq", "it is a pipe"}, [&] { load_tq_file(dir / "m.tq"); });
  expect_error(ErrorKind::kIo, {"m.tq"}, [&] { load_model(dir / "m.tq"); });
  expect_error(ErrorKind::kIo, {"m.tq"}, [&] { load_hf_folder(dir / "m.tq"); });
  expect_error(ErrorKind::kIo, {"/dev/zero", "it is a device"},
               [] { read_text_file("/dev/zero", 100); });
}

TEST(FolderFiles, NoCommandWaitsForAPipeInTheFolder) {
  if (!fs::exists(TQ_BINARY)) GTEST_SKIP() << TQ_BINARY << " is not built";
  TempDir dir;
  ::mkfifo((dir / "m.tq").c_str(), 0600);
  const std::string tq = dir / "m.tq";
  for (const Args& args :
       {Args{"quantize", tq, "-o", dir / "out.tq"}, Args{"run", tq, "x"}, Args{"verify", tq},
        Args{"inspect", tq}, logits_of(dir, tq), Args{"tokenize", tq, "--text", "x"}}) {
    const CliResult result = run_tq(dir, args);
    EXPECT_EQ(result.exit_code, 5) << args[0] << ": " << result.err;
    EXPECT_TRUE(result.err.starts_with("tq: error: ")) << result.err;
  }
}

TEST(FolderFiles, TheLinksOfAHuggingFaceCacheAreFollowed) {
  TempDir dir;
  // models--owner--name/snapshots/REVISION/file -> ../../blobs/HASH
  const std::string cache = dir / "models--a--b", snapshot = cache + "/snapshots/0123";
  fs::create_directories(snapshot);
  fs::create_directory(cache + "/blobs");
  const std::string model = copy_model(dir);
  int n_files = 0;
  for (const auto& entry : fs::directory_iterator(model)) {
    const std::string blob = "../../blobs/" + std::to_string(n_files++);
    fs::rename(entry.path(), snapshot + "/" + blob);
    fs::create_symlink(blob, snapshot + "/" + entry.path().filename().string());
  }
  EXPECT_EQ(load_hf_folder(snapshot).config.dim, 64);
  fs::create_directory_symlink(snapshot, dir / "by-link");
  EXPECT_EQ(load_hf_folder(dir / "by-link").config.dim, 64);
  // A folder made elsewhere with links into the cache, as --local-dir once did.
  fs::create_directory(dir / "local");
  for (const auto& entry : fs::directory_iterator(snapshot)) {
    fs::create_symlink(fs::canonical(entry.path()),
                       dir / "local/" + entry.path().filename().string());
  }
  EXPECT_EQ(load_hf_folder(dir / "local").config.dim, 64);
}

TEST(FolderFiles, LinksOfTextsThatLeaveTheFolderAreRefused) {
  for (const char* name : {"config.json", "generation_config.json", "tokenizer.json",
                           "tokenizer_config.json", "chat_template.jinja"}) {
    TempDir dir;
    const std::string model = copy_model(dir), path = model + "/" + name;
    write_bytes(dir / "secret", "{}");
    if (fs::exists(path)) fs::rename(path, dir / "secret");
    for (const std::string& target : {dir / "secret", std::string("../secret")}) {
      fs::create_symlink(target, path);
      expect_error(ErrorKind::kIo, {name, "secret", "blobs"}, [&] { load_hf_folder(model); });
      fs::remove(path);
    }
    fs::rename(dir / "secret", model + "/other-name");
    fs::create_symlink("other-name", path);
    EXPECT_EQ(load_hf_folder(model).config.dim, 64);
  }
}

TEST(FolderFiles, WeightsMayLieOnAnotherDisk) {
  TempDir dir;
  const std::string model = copy_model(dir);
  fs::rename(model + "/model.safetensors", dir / "weights");
  fs::create_symlink(dir / "weights", model + "/model.safetensors");
  EXPECT_EQ(load_hf_folder(model).config.dim, 64);
}

TEST(FolderFiles, AnAdapterAloneIsExplained) {
  TempDir dir;
  const std::string model = copy_model(dir);
  const std::string config = read_bytes(model + "/config.json");
  write_bytes(model + "/adapter_config.json", R"({"base_model_name_or_path":"meta/Base-8B"})");
  fs::rename(model + "/model.safetensors", model + "/adapter_model.safetensors");
  expect_error(ErrorKind::kBadData, {"LoRA adapter of meta/Base-8B", "merge"},
               [&] { load_hf_folder(model); });
  fs::remove(model + "/config.json");
  expect_error(ErrorKind::kBadData, {"LoRA adapter of meta/Base-8B", "config.json"},
               [&] { load_hf_folder(model); });
}

TEST(FolderFiles, WhatLiesBesideTheWeightsIsTold) {
  TempDir dir;
  const std::string model = copy_model(dir);
  EXPECT_TRUE(load_hf_folder(model).notes.empty());
  write_bytes(model + "/README.md", "x");
  for (const char* name : {"training_args.bin", "optimizer.pt", "rng_state.pth"}) {
    write_bytes(model + "/" + name, "x");
  }
  EXPECT_TRUE(load_hf_folder(model).notes.empty());
  write_bytes(model + "/pytorch_model.bin", "x");
  write_bytes(model + "/other.safetensors", "x");
  write_bytes(model + "/adapter_config.json", "{}");
  const std::vector<std::string> notes = load_hf_folder(model).notes;
  ASSERT_EQ(notes.size(), 2u);
  EXPECT_EQ(notes[0],
            "other.safetensors and 1 more not read: the weights are those of model.safetensors");
  EXPECT_NE(notes[1].find("LoRA adapter"), std::string::npos);
}

TEST(FolderFiles, WeightsInAnotherFormatAreNamed) {
  const std::pair<const char*, const char*> others[] = {
      {"pytorch_model.bin", "PyTorch"},
      {"consolidated.00.pth", "PyTorch"},
      {"model.Q4_K_M.gguf", "GGUF"},
      {"consolidated.safetensors", "model.safetensors"},
      {"tf_model.h5", "TensorFlow"}};
  for (const auto& [name, word] : others) {
    TempDir dir;
    const std::string model = copy_model(dir);
    fs::rename(model + "/model.safetensors", model + "/" + name);
    expect_error(ErrorKind::kBadData, {name, word}, [&] { load_hf_folder(model); });
  }
}

TEST(InputFile, ATextOfTheUserMayBeAPipeWhereThatIsAllowed) {
  TempDir dir;
  ::mkfifo((dir / "pipe").c_str(), 0600);
  const pid_t writer = ::fork();
  if (writer == 0) {
    write_bytes(dir / "pipe", "a text");
    ::_exit(0);
  }
  EXPECT_EQ(read_text_file(dir / "pipe", 100, Accept::kPipesToo), "a text");
  ::waitpid(writer, nullptr, 0);
}

TEST(InputFile, AFileThatIsWrittenToMeanwhileIsNoticed) {
  TempDir dir;
  write_bytes(dir / "file", "0123456789");
  const MappedFile file(dir / "file");
  file.check_unchanged();
  const timespec times[2] = {{1, 0}, {1, 0}};
  ::utimensat(AT_FDCWD, (dir / "file").c_str(), times, 0);
  expect_error(ErrorKind::kIo, {"file", "changed while it was read"},
               [&] { file.check_unchanged(); });
  const MappedFile longer(dir / "file");
  write_bytes(dir / "file", "0123456789a");
  expect_error(ErrorKind::kIo, {"file", "changed"}, [&] { longer.check_unchanged(); });
  EXPECT_STREQ(MappedFile::path_at(longer.data() + 3), (dir / "file").c_str());
  EXPECT_EQ(MappedFile::path_at(&times), nullptr);
}

}  // namespace
}  // namespace tq
