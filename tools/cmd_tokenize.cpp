// cmd_tokenize - `tq tokenize`: text to ids and back, to compare with any other tokenizer.
#include <cstdio>

#include "model/error.h"
#include "tools/commands.h"
#include "tools/runtime.h"

namespace tq {
namespace {

struct TokenizeOptions {
  std::string model, text, file, decode;
  bool json = false, no_special = false, have_text = false;
};

void tokenize(const TokenizeOptions& options) {
  const int sources = options.have_text + !options.file.empty() + !options.decode.empty();
  if (sources != 1) {
    throw Error(ErrorKind::kUsage, "what to tokenize?", "tq tokenize",
                "give one of --text, --file, --decode");
  }
  const Model model = load_model(options.model, Verify::kTexts);
  const Tokenizer tokenizer = open_tokenizer(model);
  if (!options.decode.empty()) {
    const std::string text =
        tokenizer.decode(parse_ids("--decode", options.decode, tokenizer.size()), false);
    options.json ? write_json({{"text", text}}) : write_text(text);
    return;
  }
  const std::string text = options.have_text ? options.text : read_input_text(options.file);
  const std::vector<int32_t> ids = tokenizer.encode(text, !options.no_special, true);
  if (options.json) {
    Json pieces = Json::array();
    for (int32_t id : ids) pieces.push_back(tokenizer.piece(id));
    write_json({{"ids", ids}, {"pieces", pieces}});
    return;
  }
  std::string out;
  for (int32_t id : ids) out += std::to_string(id) + "\t" + printable(tokenizer.piece(id)) + "\n";
  write_result(out);
}

}  // namespace

void add_tokenize_command(CLI::App& app) {
  auto options = std::make_shared<TokenizeOptions>();
  CLI::App* command = app.add_subcommand("tokenize", "text to token ids, or back");
  command->add_option("model", options->model, ".tq file or Hugging Face folder")->required();
  CLI::Option* text = command->add_option("--text", options->text, "text to tokenise");
  command->add_option("--file", options->file, "file to tokenise; - reads stdin");
  command->add_option("--decode", options->decode, "ids to turn into text");
  command->add_flag("--no-special", options->no_special,
                    "without the tokens that the post-processor adds");
  command->add_flag("--json", options->json, "{\"ids\": [...], \"pieces\": [...]}");
  command->callback([options, text] {
    options->have_text = text->count() > 0;
    tokenize(*options);
  });
}

}  // namespace tq
