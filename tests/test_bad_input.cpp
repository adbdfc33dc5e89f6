// Forty kinds of bad input, as a user meets them: exit code, one line on stderr that names the
// cause, nothing on stdout, no file left. Their positive twins: test_good_input.cpp.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cmath>
#include <cstring>

#include "model/tensor.h"
#include "tests/cli.h"

namespace tq {
namespace {

// Prepares a broken input in `dir` and returns the command line that meets it.
struct BadInput {
  const char* name;
  int exit_code;
  const char* message;  // part of the line on stderr
  std::function<Args(const TempDir& dir)> prepare;
  CliOptions cli = {};
};

std::vector<std::string> files_under(const std::string& path) {
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(path)) {
    files.push_back(entry.path().string());
  }
  std::sort(files.begin(), files.end());
  return files;
}

// --- Ways to break a model folder -------------------------------------------------------------

BadInput broken_config(const char* name, int code, const char* message,
                       std::function<void(Json&)> edit) {
  return {name, code, message, [edit](const TempDir& dir) {
            const std::string model = copy_model(dir);
            edit_json(model + "/config.json", edit);
            return logits_of(dir, model);
          }};
}

BadInput config_text(const char* name, const char* message, std::string text) {
  return {name, 3, message, [text](const TempDir& dir) {
            const std::string model = copy_model(dir);
            write_bytes(model + "/config.json", text);
            return logits_of(dir, model);
          }};
}

BadInput broken_weights(const char* name, const char* message,
                        std::function<void(Safetensors&)> edit) {
  return {name, 3, message, [edit](const TempDir& dir) {
            const std::string model = copy_model(dir);
            Safetensors weights = Safetensors::read(model + "/model.safetensors");
            edit(weights);
            weights.write(model + "/model.safetensors");
            return logits_of(dir, model);
          }};
}

BadInput weights_bytes(const char* name, const char* message,
                       std::function<std::string(std::string)> edit) {
  return {name, 3, message, [edit](const TempDir& dir) {
            const std::string model = copy_model(dir);
            const std::string path = model + "/model.safetensors";
            write_bytes(path, edit(read_bytes(path)));
            return logits_of(dir, model);
          }};
}

// Replaces the first occurrence of `from` in the header, for what a Json cannot express.
BadInput header_text(const char* name, const char* message, std::string from, std::string to) {
  return {name, 3, message, [from, to](const TempDir& dir) {
            const std::string model = copy_model(dir);
            const Safetensors weights = Safetensors::read(model + "/model.safetensors");
            std::string header = weights.header.dump();
            header.replace(header.find(from), from.size(), to);
            Safetensors::write(model + "/model.safetensors", header, weights.data);
            return logits_of(dir, model);
          }};
}

BadInput broken_tokenizer(const char* name, const char* message, std::function<void(Json&)> edit) {
  return {name, 3, message, [edit](const TempDir& dir) {
            const std::string model = copy_model(dir);
            edit_json(model + "/tokenizer.json", edit);
            return logits_of(dir, model);
          }};
}

const char* kQ = "model.layers.0.self_attn.q_proj.weight";

BadInput broken_index(const char* name, const char* message,
                      std::function<void(const std::string& model)> edit) {
  return {name, 3, message, [edit](const TempDir& dir) {
            const std::string model = shard_model(dir);
            edit(model);
            return logits_of(dir, model);
          }};
}

// Not inlined: GCC 12 takes the write for one into the string's own storage and warns.
[[gnu::noinline]] std::string flipped(std::string bytes, size_t i) {
  bytes[i] = static_cast<char>(bytes[i] ^ 4);
  return bytes;
}

BadInput broken_tq(const char* name, const char* message,
                   std::function<std::string(std::string)> edit, bool verify = false) {
  return {name, 3, message, [edit, verify](const TempDir& dir) {
            write_bytes(dir / "m.tq", edit(tq_bytes()));
            return verify ? Args{"verify", dir / "m.tq"} : logits_of(dir, dir / "m.tq");
          }};
}

BadInput usage(const char* name, const char* message, Args args) {
  return {name, 2, message, [args](const TempDir& dir) {
            Args all = args;
            for (std::string& arg : all) {
              if (arg == "MODEL") arg = copy_model(dir);
              if (arg == "OUT") arg = dir / "out.tq";
            }
            return all;
          }};
}

BadInput command(const char* name, int code, const char* message,
                 std::function<Args(const TempDir&)> prepare, CliOptions cli = {}) {
  return {name, code, message, std::move(prepare), std::move(cli)};
}

std::vector<BadInput> folders() {
  return {
      command("N01_NoSuchFolder", 5, "does not exist",
              [](const TempDir& dir) { return logits_of(dir, dir / "nothing"); }),
      command("N01_AFileThatIsNoModel", 3, "not a",
              [](const TempDir& dir) {
                write_bytes(dir / "x.bin", "hello");
                return logits_of(dir, dir / "x.bin");
              }),
      command("N02_NoConfig", 3, "config.json not found",
              [](const TempDir& dir) {
                const std::string model = copy_model(dir);
                std::filesystem::remove(model + "/config.json");
                return logits_of(dir, model);
              }),
      config_text("N03_ConfigSyntax", "line 2, column", "{\"a\": 1,\n }"),
      config_text("N03_ConfigEmpty", "config.json", ""),
      config_text("N03_ConfigOfBrackets", "nested deeper", std::string(1 << 20, '[')),
      broken_config("N04_Architecture", 3, "supported: LlamaForCausalLM, Qwen3ForCausalLM",
                    [](Json& c) { c["architectures"] = {"Qwen3MoeForCausalLM"}; }),
      broken_config("N05_AlreadyQuantized", 3, "already quantized",
                    [](Json& c) {
                      c["quantization_config"] = {{"bits", 4}};
                    }),
      command("N05_QuantizeATqFile", 3, "already quantized",
              [](const TempDir& dir) {
                write_bytes(dir / "m.tq", tq_bytes());
                return Args{"quantize", dir / "m.tq", "-o", dir / "o.tq"};
              }),
      command("N05_Gguf", 3, "GGUF",
              [](const TempDir& dir) {
                write_bytes(dir / "m.gguf", "GGUF" + std::string(64, '\0'));
                return logits_of(dir, dir / "m.gguf");
              }),
      broken_config("N06_ZeroSize", 3, "hidden_size", [](Json& c) { c["hidden_size"] = 0; }),
      broken_config("N06_NegativeSize", 3, "num_hidden_layers",
                    [](Json& c) { c["num_hidden_layers"] = -1; }),
      broken_config("N06_FloatSize", 3, "intermediate_size",
                    [](Json& c) { c["intermediate_size"] = 172.0; }),
      broken_config("N06_HugeSize", 3, "vocab_size",
                    [](Json& c) { c["vocab_size"] = 18446744073709551615ull; }),
      broken_config("N06_StringSize", 3, "num_attention_heads",
                    [](Json& c) { c["num_attention_heads"] = "8"; }),
      broken_config("N07_HeadsNotAMultiple", 3, "num_key_value_heads 3",
                    [](Json& c) { c["num_key_value_heads"] = 3; }),
      broken_config("N07_OddHeadDim", 3, "head_dim", [](Json& c) { c["head_dim"] = 7; }),
      broken_config("N08_RopeType", 3, "longrope",
                    [](Json& c) {
                      c["rope_scaling"] = {{"rope_type", "longrope"}};
                    }),
      broken_config("N08_Llama3MissingKey", 3, "low_freq_factor",
                    [](Json& c) {
                      c["rope_scaling"] = {{"rope_type", "llama3"}, {"factor", 8.0}};
                    }),
      broken_config("N08_Llama3HighBelowLow", 3, "high_freq_factor",
                    [](Json& c) {
                      c["rope_scaling"] = {{"rope_type", "llama3"},
                                           {"factor", 8.0},
                                           {"low_freq_factor", 4.0},
                                           {"high_freq_factor", 4.0},
                                           {"original_max_position_embeddings", 256}};
                    }),
      broken_config("N08_RopeSchemasContradict", 3, "two values of rope_theta",
                    [](Json& c) {
                      c["rope_parameters"] = {{"rope_theta", 5.0}};
                    }),
      broken_config("N09_SlidingWindow", 3, "use_sliding_window",
                    [](Json& c) { c["use_sliding_window"] = true; }),
      broken_config("N09_AttentionBias", 3, "attention_bias",
                    [](Json& c) { c["attention_bias"] = true; }),
      broken_config("N09_Activation", 3, "hidden_act", [](Json& c) { c["hidden_act"] = "gelu"; }),
      broken_config("N09_UnknownField", 3, "logit_softcap",
                    [](Json& c) { c["logit_softcap"] = 30.0; }),
  };
}

std::vector<BadInput> weights() {
  return {
      broken_index("N10_MissingShards", "model-00001-of-00002.safetensors",
                   [](const std::string& model) {
                     std::filesystem::remove(model + "/model-00001-of-00002.safetensors");
                   }),
      broken_index("N11_ShardOutsideTheFolder", "../x",
                   [](const std::string& model) {
                     edit_json(model + "/model.safetensors.index.json",
                               [](Json& index) { index["weight_map"][kQ] = "../x"; });
                   }),
      broken_index("N11_ShardIsASymlinkLoop", "model-00001",
                   [](const std::string& model) {
                     const std::string shard = model + "/model-00001-of-00002.safetensors";
                     std::filesystem::remove(shard);
                     std::filesystem::create_symlink(shard, shard);
                   }),
      broken_weights("N12_TensorMissing", kQ,
                     [](Safetensors& w) {
                       w.header["model.layers.0.other.weight"] = w.header[kQ];
                       w.header.erase(kQ);
                     }),
      broken_weights("N12_WrongShape", kQ,
                     [](Safetensors& w) {
                       w.header[kQ]["shape"] = {32, 128};
                     }),
      broken_weights("N12_WrongRank", kQ,
                     [](Safetensors& w) {
                       w.header[kQ]["shape"] = {64, 64, 1};
                     }),
      broken_index("N13_TensorInTwoShards", "model.norm.weight",
                   [](const std::string& model) {
                     const std::string a = model + "/model-00001-of-00002.safetensors";
                     Safetensors one = Safetensors::read(a);
                     one.header["model.norm.weight"] = {
                         {"dtype", "F32"},
                         {"shape", {64}},
                         {"data_offsets", {one.data.size(), one.data.size() + 256}}};
                     one.data += std::string(256, '\0');
                     one.write(a);
                   }),
      broken_config("N14_UntiedWithoutHead", 3, "lm_head.weight",
                    [](Json& c) { c["tie_word_embeddings"] = false; }),
      broken_weights("N15_TiedButHeadDiffers", "lm_head.weight",
                     [](Safetensors& w) {
                       const size_t begin = w.data.size();
                       w.header["lm_head.weight"] = {{"dtype", "F32"},
                                                     {"shape", {512, 64}},
                                                     {"data_offsets", {begin, begin + 131072}}};
                       w.data += std::string(131072, '\0');
                     }),
      weights_bytes("N16_EmptyFile", "0 bytes", [](std::string) { return ""; }),
      weights_bytes("N16_SevenBytes", "7 bytes", [](std::string b) { return b.substr(0, 7); }),
      weights_bytes("N16_EmptyHeader", "empty",
                    [](std::string b) { return std::string(8, '\0') + b.substr(8); }),
      weights_bytes("N17_HeaderLengthAllOnes", "18446744073709551615",
                    [](std::string b) { return std::string(8, '\xff') + b.substr(8); }),
      weights_bytes("N17_HeaderOver100MB", "100000000",
                    [](std::string b) {
                      const uint64_t n = 100000001;
                      return std::string(reinterpret_cast<const char*>(&n), 8) + b.substr(8);
                    }),
      weights_bytes("N17_HeaderBeyondTheFile", "incomplete download?",
                    [](std::string b) {
                      const uint64_t n = 50000000;
                      return std::string(reinterpret_cast<const char*>(&n), 8) + b.substr(8);
                    }),
      header_text("N18_HeaderNotUtf8", "UTF-8", "model.norm", "model.n\xff\xffm"),
      header_text("N18_HeaderNotJson", "model.safetensors", "{", "["),
      header_text("N19_DuplicateTensor", "twice", "model.norm.weight", kQ),
      header_text("N19_DuplicateDtype", "twice", "\"shape\"", "\"dtype\":\"F32\",\"shape\""),
      broken_weights("N20_UnknownDtype", "F33",
                     [](Safetensors& w) { w.header[kQ]["dtype"] = "F33"; }),
      broken_weights("N20_IntegerWeight", "I64",
                     [](Safetensors& w) {
                       w.header[kQ]["dtype"] = "I64";
                       w.header[kQ]["shape"] = {32, 64};
                     }),
      broken_weights("N21_ShapeOverflows", "overflow",
                     [](Safetensors& w) {
                       w.header[kQ]["shape"] = {4294967296, 4294967296, 4294967296};
                     }),
      broken_weights("N21_ShapeWrapsToZero", "overflow",
                     [](Safetensors& w) {
                       w.header[kQ]["shape"] = {4294967296, 4294967296};
                     }),
      broken_weights("N22_OffsetsReversed", kQ,
                     [](Safetensors& w) {
                       w.header[kQ]["data_offsets"] = {w.header[kQ]["data_offsets"][1],
                                                       w.header[kQ]["data_offsets"][0]};
                     }),
      broken_weights("N22_OffsetNegative", kQ,
                     [](Safetensors& w) { w.header[kQ]["data_offsets"][0] = -4; }),
      broken_weights("N22_Overlap", "overlap",
                     [](Safetensors& w) {
                       w.header["model.norm.weight"]["data_offsets"] = {0, 256};
                     }),
      broken_weights("N22_OffsetsBeyondTheFile", "",
                     [](Safetensors& w) {
                       w.header[kQ]["data_offsets"] = {1u << 30, (1u << 30) + 16384};
                     }),
      broken_weights("N23_SpanAndShapeDisagree", kQ,
                     [](Safetensors& w) {
                       w.header[kQ]["shape"] = {64, 63};
                     }),
      weights_bytes("N24_OneByteShort", "incomplete download?",
                    [](std::string b) { return b.substr(0, b.size() - 1); }),
      weights_bytes("N24_OneByteLong", "bytes", [](std::string b) { return b + "x"; }),
      weights_bytes("N24_Half", "incomplete download?",
                    [](std::string b) { return b.substr(0, b.size() / 2); }),
      command("N25_NotANumber", 3, "layers.0.wq: 1 values, the first at index 77",
              [](const TempDir& dir) {
                const std::string model = copy_model(dir);
                Safetensors w = Safetensors::read(model + "/model.safetensors");
                set_f32(w, kQ, 77, NAN);
                w.write(model + "/model.safetensors");
                return Args{"quantize", model, "-o", dir / "o.tq"};
              }),
  };
}

std::vector<BadInput> tokenizers_and_tq() {
  return {
      command("N26_NoTokenizer", 3, "tokenizer.json",
              [](const TempDir& dir) {
                const std::string model = copy_model(dir);
                std::filesystem::remove(model + "/tokenizer.json");
                return logits_of(dir, model);
              }),
      broken_tokenizer("N26_EmptyVocab", "vocab",
                       [](Json& t) { t["model"]["vocab"] = Json::object(); }),
      broken_tokenizer("N26_EmptyMerges", "merges",
                       [](Json& t) { t["model"]["merges"] = Json::array(); }),
      broken_tokenizer("N26_MergesOfTheWrongType", "merges",
                       [](Json& t) { t["model"]["merges"] = "a b"; }),
      broken_tokenizer("N27_Unigram", "Unigram", [](Json& t) { t["model"]["type"] = "Unigram"; }),
      broken_tokenizer("N27_PreTokenizer", "Martian",
                       [](Json& t) {
                         t["pre_tokenizer"] = {{"type", "Martian"}};
                       }),
      broken_tokenizer("N27_Normalizer", "Rot13",
                       [](Json& t) {
                         t["normalizer"] = {{"type", "Rot13"}};
                       }),
      broken_tokenizer("N28_MergeOutsideTheVocab", "0",
                       [](Json& t) { t["model"]["merges"][0] = "qq zz"; }),
      broken_tokenizer("N28_DuplicateId", "5",
                       [](Json& t) {
                         for (auto& item : t["model"]["vocab"].items()) {
                           if (item.value() == 6) item.value() = 5;
                         }
                       }),
      broken_tokenizer("N28_IdBeyondTheEmbedding", "512 rows",
                       [](Json& t) {
                         t["added_tokens"].push_back({{"id", 512},
                                                      {"content", "<x>"},
                                                      {"single_word", false},
                                                      {"lstrip", false},
                                                      {"rstrip", false},
                                                      {"normalized", false},
                                                      {"special", true}});
                       }),
      broken_tq("N29_BadMagic", "not a", [](std::string b) { return flipped(std::move(b), 0); }),
      broken_tq("N29_FutureVersion", "format version 6",
                [](std::string b) { return flipped(std::move(b), 8); }),
      broken_tq("N29_ByteOrder", "byte order",
                [](std::string b) {
                  std::reverse(b.begin() + 12, b.begin() + 16);
                  return b;
                }),
      broken_tq("N29_Truncated", "incomplete copy?",
                [](std::string b) { return b.substr(0, b.size() - 100); }),
      broken_tq("N29_HeaderBitFlip", "checksum of the header",
                [](std::string b) {
                  const size_t i = b.size() - 50;
                  return flipped(std::move(b), i);
                }),
      broken_tq(
          "N29_DataBitFlip", "tok_embed", [](std::string b) { return flipped(std::move(b), 200); },
          true),
  };
}

std::vector<BadInput> commands() {
  return {
      usage("N31_EmptyPrompt", "empty prompt", {"run", "MODEL", ""}),
      usage("N31_NoPrompt", "empty prompt", {"run", "MODEL"}),
      command("N31_PromptNotUtf8", 3, "UTF-8",
              [](const TempDir& dir) {
                return Args{"run", copy_model(dir), "abc\xff\xfe", "-q"};
              }),
      command("N31_TenMegabytesOfOneLetter", 3, "the context is",
              [](const TempDir& dir) {
                write_bytes(dir / "long.txt", std::string(10 << 20, 'a'));
                return Args{"run", copy_model(dir), "--file", dir / "long.txt", "-q"};
              }),
      command("N32_PromptPlusTokensBeyondContext", 3, "the context is 20",
              [](const TempDir& dir) {
                return Args{"run", copy_model(dir), "Once", "-n", "30", "--ctx", "20", "-q"};
              }),
      command("N32_ChatWithABaseModel", 3, "no chat template",
              [](const TempDir& dir) {
                return Args{"chat", copy_model(dir)};
              }),
      usage("N32_ContextBeyondTheModel", "512", {"run", "MODEL", "Once", "--ctx", "4096", "-q"}),
      usage("N33_UnknownCommand", "did you mean quantize", {"quantise"}),
      usage("N33_UnknownOption", "did you mean --temp", {"run", "MODEL", "x", "--tmp", "1"}),
      usage("N33_MissingValue", "--temp", {"run", "MODEL", "x", "--temp"}),
      usage("N33_TempText", "--temp", {"run", "MODEL", "x", "--temp", "abc"}),
      usage("N33_TempNegative", "--temp", {"run", "MODEL", "x", "--temp", "-1"}),
      usage("N33_TempNan", "--temp", {"run", "MODEL", "x", "--temp", "nan"}),
      usage("N33_TopP", "--top-p", {"run", "MODEL", "x", "--top-p", "2"}),
      usage("N33_Count", "--max-tokens", {"run", "MODEL", "x", "-n", "99999999999"}),
      usage("N33_SeedTrailing", "--seed", {"run", "MODEL", "x", "--seed", "1x"}),
      usage("N33_Hexadecimal", "--temp", {"run", "MODEL", "x", "--temp", "0x1"}),
      usage("N33_EmptyStop", "--stop", {"run", "MODEL", "x", "--stop", ""}),
      usage("N33_UnknownOptionAlone", "did you mean --help", {"run", "--hlep"}),
      usage("N33_UnknownOptionOfTq", "did you mean --version", {"--versoin"}),
      usage("N33_TokenId", "0..511", {"logits", "MODEL", "--ids", "1,512", "-o", "OUT"}),
      usage("N33_MissingId", "0..511", {"logits", "MODEL", "--ids", "1,,2", "-o", "OUT"}),
      usage("N33_LeadingComma", "0..511", {"logits", "MODEL", "--ids", ",1", "-o", "OUT"}),
      usage("N33_TrailingComma", "0..511", {"logits", "MODEL", "--ids", "1,2,", "-o", "OUT"}),
      usage("N33_IdAndLetter", "0..511", {"logits", "MODEL", "--ids", "1,2x", "-o", "OUT"}),
      usage("N33_IdAndSign", "0..511", {"logits", "MODEL", "--ids", "1;2", "-o", "OUT"}),
      usage("N33_TokenIdText", "--decode", {"tokenize", "MODEL", "--decode", "1,x"}),
      usage("N33_UnknownTemplate", "qwen3-thinking", {"run", "MODEL", "x", "--template", "zephyr"}),
      usage("N33_NoCommand", "no command", {}),
      usage("N34_RawAndSystem", "--raw", {"run", "MODEL", "x", "--raw", "--system", "y"}),
      usage("N34_RawAndTemplate", "--raw", {"run", "MODEL", "x", "--raw", "--template", "qwen3"}),
      command("N34_TemplateWhoseTokensAreMissing", 3, "<|im_start|>",
              [](const TempDir& dir) {
                return Args{"run", copy_model(dir), "x", "--template", "qwen3"};
              }),
      usage("N34_ThinkOnLlama", "--think", {"run", "MODEL", "x", "--think", "-q"}),
      usage("N34_MethodUnknown", "rtn", {"quantize", "MODEL", "-o", "OUT", "--method", "magic"}),
      usage("N34_RankBeyondTheDimension", "rank",
            {"quantize", "MODEL", "-o", "OUT", "--method", "svdquant", "--rank", "65"}),
      command("N35_OutputExists", 5, "--force",
              [](const TempDir& dir) {
                write_bytes(dir / "o.tq", "precious");
                return Args{"quantize", copy_model(dir), "-o", dir / "o.tq"};
              }),
      command("N35_OutputFolderMissing", 5, "o.tq",
              [](const TempDir& dir) {
                return Args{"quantize", copy_model(dir), "-o", dir / "no/such/o.tq"};
              }),
      command("N35_OutputIsAFolder", 5, "",
              [](const TempDir& dir) {
                return Args{"quantize", copy_model(dir), "-o", dir.path(), "--force"};
              }),
      command("N35_OutputIsTheInputByHardLink", 5, "input",
              [](const TempDir& dir) {
                const std::string model = copy_model(dir);
                std::filesystem::create_hard_link(model + "/model.safetensors", dir / "o.tq");
                return Args{"quantize", model, "-o", dir / "o.tq", "--force"};
              }),
      command("N35_LogitsOverTheModel", 5, "input",
              [](const TempDir& dir) {
                write_bytes(dir / "m.tq", tq_bytes());
                return Args{"logits", dir / "m.tq", "--ids", "1", "-o", dir / "m.tq"};
              }),
      command("N35_LogitsOverAFileOfTheFolder", 5, "input",
              [](const TempDir& dir) {
                const std::string model = copy_model(dir);
                return Args{"logits", model, "--ids", "1", "-o", model + "/tokenizer.json"};
              }),
      command("N35_OutputIsNoRegularFile", 5, "not a regular file",
              [](const TempDir& dir) {
                ::mkfifo((dir / "pipe").c_str(), 0600);
                return Args{"logits", copy_model(dir), "--ids", "1", "-o", dir / "pipe"};
              }),
      command("N36_DiskFull", 5, "o.tq",
              [](const TempDir& dir) {
                return Args{"quantize", copy_model(dir), "-o", dir / "o.tq",
                            "--method", "rtn",           "-q"};
              },
              {.file_size_limit = 65536}),
      command("N37_StdoutFull", 5, "stdout",
              [](const TempDir& dir) {
                return Args{"run", copy_model(dir), "Once upon", "-n", "5", "-q"};
              },
              {.stdout_path = "/dev/full"}),
      command("N38_MemoryLimit", 4, "memory",
              [](const TempDir& dir) {
                const std::string model = copy_model(dir);
                edit_json(model + "/config.json",
                          [](Json& c) { c["max_position_embeddings"] = 16777216; });
                return Args{"run", model, "Once upon", "--ctx", "16777216", "-q"};
              },
              {.memory_limit = rlim_t{2} << 30}),
      command("N38_FileBeyondTheAddressSpace", 4, "Cannot allocate memory",
              [](const TempDir& dir) {
                const std::string model = copy_model(dir);
                std::filesystem::resize_file(model + "/model.safetensors", uint64_t{10} << 30);
                return logits_of(dir, model);
              },
              {.memory_limit = rlim_t{2} << 30}),
      command("N39_NoGpu", 4, "--device cpu",
              [](const TempDir& dir) {
                return Args{"run", copy_model(dir), "Once", "--device", "cuda"};
              }),
      command("N39_NoGpuToCalibrateOn", 4, "--device cpu",
              [](const TempDir& dir) {
                return Args{"quantize", copy_model(dir), "-o",       dir / "o.tq",
                            "--method", "gptq",          "--device", "cuda"};
              }),
      usage("N39_DeviceUnknown", "--device", {"run", "MODEL", "x", "--device", "9"}),
      command("N40_CalibrationMissing", 5, "calib.txt",
              [](const TempDir& dir) {
                return Args{"quantize", copy_model(dir), "-o",      dir / "o.tq",
                            "--method", "gptq",          "--calib", dir / "calib.txt"};
              }),
      command("N40_CalibrationEmpty", 3, "empty",
              [](const TempDir& dir) {
                write_bytes(dir / "c.txt", "");
                return Args{"quantize", copy_model(dir), "-o",      dir / "o.tq",
                            "--method", "gptq",          "--calib", dir / "c.txt"};
              }),
      command("N40_CalibrationTooShort", 3, "tokens",
              [](const TempDir& dir) {
                write_bytes(dir / "c.txt", "Once upon a time.");
                return Args{"quantize", copy_model(dir), "-o",      dir / "o.tq",
                            "--method", "gptq",          "--calib", dir / "c.txt"};
              }),
      command("N40_CalibrationLineWithoutText", 3, "c.jsonl, line 2",
              [](const TempDir& dir) {
                write_bytes(dir / "c.jsonl", "{\"text\": \"Once\"}\n{\"txt\": 1}\n");
                return Args{"quantize", copy_model(dir), "-o",      dir / "o.tq",
                            "--method", "gptq",          "--calib", dir / "c.jsonl"};
              }),
      command("N40_CalibrationNotUtf8", 3, "UTF-8",
              [](const TempDir& dir) {
                write_bytes(dir / "c.txt", std::string(10000, '\xfe'));
                return Args{"quantize", copy_model(dir), "-o",      dir / "o.tq",
                            "--method", "gptq",          "--calib", dir / "c.txt"};
              }),
  };
}

std::vector<BadInput> all_bad_inputs() {
  std::vector<BadInput> all;
  for (auto part : {folders, weights, tokenizers_and_tq, commands}) {
    for (BadInput& input : part()) all.push_back(std::move(input));
  }
  return all;
}

class BadInputs : public ::testing::TestWithParam<BadInput> {};
TEST_P(BadInputs, OneLineTheRightExitCodeAndNothingLost) {
  const BadInput& bad = GetParam();
#if defined(__SANITIZE_ADDRESS__)
  if (bad.cli.memory_limit) GTEST_SKIP() << "AddressSanitizer needs terabytes of address space";
#endif
  TempDir dir;
  const Args args = bad.prepare(dir);
  const std::vector<std::string> before = files_under(dir.path());
  const CliResult result = run_tq(dir, args, bad.cli);
  EXPECT_EQ(result.exit_code, bad.exit_code) << result.err;
  EXPECT_EQ(result.out, "");
  EXPECT_TRUE(result.err.starts_with("tq: error: ")) << result.err;
  EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
  EXPECT_NE(result.err.find(bad.message), std::string::npos) << result.err;
  EXPECT_EQ(files_under(dir.path()), before);
}
INSTANTIATE_TEST_SUITE_P(All, BadInputs, ::testing::ValuesIn(all_bad_inputs()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace tq
