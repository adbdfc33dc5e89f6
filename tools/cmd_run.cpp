// cmd_run - `tq run` (one prompt) and `tq chat` (many turns on a terminal).
//
// stdout carries the generated text and one final newline, nothing else. The token loop is
// generate.cpp.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <optional>

#include "model/error.h"
#include "tools/commands.h"
#include "tools/generate.h"
#include "tools/turn_reader.h"

namespace tq {
namespace {

constexpr int64_t kDefaultCtx = 4096;  // a KV cache of the model's own limit can be gigabytes
constexpr int64_t kDefaultMaxTokens = 512;

struct RunOptions {
  std::string model, prompt, file, system, chat_template;
  int64_t max_tokens = -1, ctx = -1;
  SamplingFlags sampling;
  DeviceOptions device;
  std::vector<std::string> stop;
  bool raw = false, no_think = false, think = false, parse_special = false, show_special = false;
  bool ignore_eos = false, print_prompt = false, quiet = false, verbose = false, json = false;
  std::string date = ChatOptions().date;
};

std::string prompt_text(const RunOptions& options) {
  if (!options.file.empty() && !options.prompt.empty()) {
    throw Error(ErrorKind::kUsage, "two prompts", "tq run", "a prompt and --file were given");
  }
  std::string text = options.prompt;
  if (!options.file.empty()) text = read_input_text(options.file);
  if (options.prompt == "-") text = read_input_text("-");
  if (text.empty()) {
    throw Error(ErrorKind::kUsage, "empty prompt", "tq run", "there is no text to continue",
                "tq run MODEL \"text\", or --file FILE");
  }
  return text;
}

void check_think(ChatKind kind, const RunOptions& options) {
  if (options.think && options.no_think) {
    throw Error(ErrorKind::kUsage, "contradictory options", "tq run", "--think and --no-think");
  }
  if ((options.think || options.no_think) && kind != ChatKind::kQwen3) {
    throw Error(ErrorKind::kUsage, "contradictory options", "tq run",
                std::string("--think and --no-think need a model with switchable thinking; this "
                            "one's template is ") +
                    chat_kind_name(kind));
  }
}

// The template to use, kNone for a raw prompt. Says so when a model has none: a chat prompt sent
// raw to a base model is a frequent surprise. `chatting` needs one.
ChatKind choose_template(const Runtime& runtime, const RunOptions& options, bool chatting) {
  if (!options.quiet) print_notes(runtime.model, runtime.tokenizer);
  if (options.raw) {
    if (!options.system.empty() || options.think || options.no_think ||
        !options.chat_template.empty()) {
      throw Error(ErrorKind::kUsage, "contradictory options", "tq run",
                  "--raw sends the prompt as it is; --system, --think, --no-think and --template "
                  "are for a chat template");
    }
    return ChatKind::kNone;
  }
  const ChatKind kind = options.chat_template.empty()
                            ? detect_chat_kind(runtime.model.texts, runtime.model.source)
                            : chat_kind_of_name(options.chat_template);
  if (kind == ChatKind::kUnknown) {
    throw Error(ErrorKind::kBadData, "unknown chat template", runtime.model.source,
                "tq does not know this model's template and will not guess one",
                "choose one with --template, or use --raw and write the turn markers yourself with "
                "--parse-special");
  }
  if (kind == ChatKind::kNone) {
    if (chatting) {
      throw Error(ErrorKind::kBadData, "no chat template", options.model, "this is a base model",
                  "use tq run");
    }
    if (!options.system.empty()) {
      throw Error(ErrorKind::kUsage, "contradictory options", "tq run",
                  "--system needs a chat template and this model has none");
    }
    if (!options.quiet) {
      std::fprintf(stderr, "tq: the model has no chat template; the prompt is sent as it is\n");
    }
  }
  check_think(kind, options);
  return kind;
}

std::vector<int32_t> prompt_ids(const Runtime& runtime, const RunOptions& options, ChatKind kind,
                                const std::string& text) {
  if (kind == ChatKind::kNone) {
    return runtime.tokenizer.encode(text, true, options.parse_special);
  }
  std::vector<Message> messages;
  if (!options.system.empty()) messages.push_back({"system", options.system});
  messages.push_back({"user", text});
  ChatOptions chat;
  chat.think = !options.no_think;
  chat.date = options.date;
  if (options.print_prompt) {
    const std::string rendered = render_chat(kind, messages, chat);
    std::fprintf(stderr, "%s",
                 (::isatty(STDERR_FILENO) == 1 ? printable_text(rendered) : rendered).c_str());
  }
  return encode_chat(runtime.tokenizer, kind, messages, chat, options.parse_special);
}

GenerateOptions generate_options(const Runtime& runtime, const RunOptions& options) {
  GenerateOptions generate;
  generate.stop_texts = options.stop;
  generate.show_special = options.show_special;
  if (!options.ignore_eos) {
    generate.stop_ids = stop_tokens(runtime.model.texts, runtime.model.config, runtime.tokenizer,
                                    runtime.model.source);
  }
  return generate;
}

void report(const GenerateResult& result, const Runtime& runtime) {
  const auto rate = [](int64_t count, double seconds) {
    return seconds > 0 ? static_cast<double>(count) / seconds : 0.0;
  };
  const int64_t generated = static_cast<int64_t>(result.ids.size());
  std::fprintf(
      stderr, "tq: prompt %lld tokens, %.1f tok/s; generated %lld tokens, %.1f tok/s; %s; %s\n",
      static_cast<long long>(result.n_prompt), rate(result.n_prompt, result.prefill_seconds),
      static_cast<long long>(generated), rate(generated - 1, result.decode_seconds),
      finish_reason_name(result.reason), runtime.backend->name().c_str());
}

Json run_json(const GenerateResult& result, const SamplerOptions& sampling) {
  Json json = {{"schema", 1},
               {"text", result.text},
               {"finish_reason", finish_reason_name(result.reason)},
               {"n_prompt", result.n_prompt},
               {"ids", result.ids},
               {"temperature", sampling.temperature},
               {"seed", sampling.seed},
               {"prefill_seconds", result.prefill_seconds},
               {"decode_seconds", result.decode_seconds}};
  return json;
}

void run(const RunOptions& options) {
  const std::string text = prompt_text(options);
  Runtime runtime(options.model, options.device);
  const ChatKind kind = choose_template(runtime, options, false);
  const std::vector<int32_t> ids = prompt_ids(runtime, options, kind, text);
  const int64_t n_prompt = static_cast<int64_t>(ids.size());
  const int64_t ctx =
      options.ctx > 0 ? runtime.checked_ctx(options.ctx) : runtime.default_ctx(kDefaultCtx);
  const int64_t limit = runtime.model.config.max_seq_len;
  // An explicit -n is a promise to deliver that many, so it must fit; the default is a limit.
  if (n_prompt + (options.max_tokens > 0 ? options.max_tokens : 1) > ctx) {
    throw Error(
        ErrorKind::kBadData, "prompt does not fit", options.model,
        "prompt has " + std::to_string(n_prompt) + " tokens" +
            (options.max_tokens > 0 ? ", -n asks for " + std::to_string(options.max_tokens) : "") +
            ", the context is " + std::to_string(ctx),
        ctx < limit ? "raise --ctx (up to " + std::to_string(limit) + ") or lower -n"
                    : "shorten the prompt or lower -n");
  }
  GenerateOptions generate_opts = generate_options(runtime, options);
  generate_opts.max_tokens = options.max_tokens >= 0 ? options.max_tokens : kDefaultMaxTokens;
  const SamplerOptions sampling = resolve_sampling(options.sampling, runtime, options.quiet);
  if (options.verbose) {
    note(options.model + "; " + describe_sampling(sampling) + "; context " + std::to_string(ctx));
  }
  Session session(runtime.prepared, runtime.session_options(ctx, options.device.kv_bits));
  Sampler sampler(sampling);
  sampler.begin(ids);
  const GenerateResult result = generate(session, runtime.tokenizer, ids, sampler, generate_opts,
                                         [&](const std::string& piece) {
                                           if (!options.json) write_text(piece);
                                         });
  if (result.ids.empty()) check_interrupted();  // no text has begun
  options.json ? write_json(run_json(result, sampling)) : write_result("\n");
  if (result.reason == FinishReason::kContextFull && !options.quiet) {
    std::fprintf(stderr, "tq: stopped: the context of %lld tokens is full\n",
                 static_cast<long long>(ctx));
  }
  if (options.verbose) report(result, runtime);
  if (result.reason == FinishReason::kInterrupted) std::exit(130);
}

// Room that is kept for an answer when a conversation is fitted into its context.
int64_t answer_room(int64_t ctx) {
  return std::min<int64_t>(256, ctx / 4);
}

// The ids of a conversation that leave room for an answer. The oldest turns go if they must, and a
// note says so; nothing if the last turn alone is too long.
std::optional<std::vector<int32_t>> fitting_ids(const Tokenizer& tokenizer, ChatKind kind,
                                                std::vector<Message>& messages,
                                                const ChatOptions& chat_options, bool parse_special,
                                                int64_t ctx) {
  const size_t first = !messages.empty() && messages[0].role == "system" ? 1 : 0;
  int64_t n_dropped = 0;
  for (;;) {
    std::vector<int32_t> ids = encode_chat(tokenizer, kind, messages, chat_options, parse_special);
    const int64_t count = std::ssize(ids);
    const bool last_turn = messages.size() == first + 1;
    if (count + answer_room(ctx) <= ctx || (last_turn && count < ctx)) {
      if (n_dropped > 0) {
        note("the context of " + std::to_string(ctx) + " tokens is full: the oldest " +
             (n_dropped == 1 ? "turn was" : std::to_string(n_dropped) + " turns were") +
             " forgotten");
      }
      return ids;
    }
    if (last_turn) {
      note("that turn needs " + std::to_string(count) + " tokens, the context has " +
           std::to_string(ctx) + "; it was not sent (raise --ctx or shorten it)");
      return std::nullopt;
    }
    // A question and its answer.
    const auto oldest = messages.begin() + static_cast<std::ptrdiff_t>(first);
    messages.erase(oldest, oldest + 2);
    ++n_dropped;
  }
}

void chat(const RunOptions& options) {
  Runtime runtime(options.model, options.device);
  const ChatKind kind = choose_template(runtime, options, true);
  const int64_t ctx =
      options.ctx > 0 ? runtime.checked_ctx(options.ctx) : runtime.default_ctx(kDefaultCtx);
  Session session(runtime.prepared, runtime.session_options(ctx, options.device.kv_bits));
  Sampler sampler(resolve_sampling(options.sampling, runtime, options.quiet));
  GenerateOptions generate_opts = generate_options(runtime, options);
  ChatOptions chat_options;
  chat_options.think = !options.no_think;
  chat_options.date = options.date;

  std::vector<Message> messages;
  if (!options.system.empty()) messages.push_back({"system", options.system});
  std::vector<int32_t> cached;  // ids whose keys and values the session holds
  TurnReader reader;
  while (const std::optional<std::string> line = reader.next()) {
    if (line->empty()) continue;
    const std::vector<Message> before = messages;
    messages.push_back({"user", *line});
    const std::optional<std::vector<int32_t>> fitting =
        fitting_ids(runtime.tokenizer, kind, messages, chat_options, options.parse_special, ctx);
    if (!fitting) {
      messages = before;
      continue;
    }
    const std::vector<int32_t>& ids = *fitting;
    // The template may rewrite history (Qwen3 drops old thinking): keep only the common beginning.
    // At least one token is fed, to have logits.
    size_t common = 0;
    while (common < cached.size() && common + 1 < ids.size() && cached[common] == ids[common]) {
      ++common;
    }
    session.truncate(static_cast<int64_t>(common));
    sampler.begin(ids);
    generate_opts.max_tokens = options.max_tokens >= 0 ? options.max_tokens : ctx;
    const GenerateResult result =
        generate(session, runtime.tokenizer,
                 std::vector<int32_t>(ids.begin() + static_cast<std::ptrdiff_t>(common), ids.end()),
                 sampler, generate_opts, write_text);
    write_stdout("\n");
    // On a terminal the first Ctrl-C ends the answer, at the next prompt it ends the conversation.
    if (result.reason == FinishReason::kInterrupted && !(reader.terminal() && forget_ctrl_c())) {
      check_interrupted();
    }
    if (result.reason == FinishReason::kContextFull) {
      note("the answer ends here: the context of " + std::to_string(ctx) + " tokens is full");
    }
    if (result.reason == FinishReason::kInterrupted && result.ids.empty()) {
      messages.pop_back();  // the turn was taken back before there was an answer
    } else {
      messages.push_back({"assistant", result.text});
    }
    cached = ids;
    cached.insert(cached.end(), result.ids.begin(), result.ids.end());
    cached.resize(static_cast<size_t>(session.position()));
    if (options.verbose) report(result, runtime);
  }
}

void add_common_options(CLI::App& command, RunOptions& options) {
  command.add_option("model", options.model, ".tq file or Hugging Face folder")->required();
  command.add_option("-n,--max-tokens", options.max_tokens, "stop after this many tokens")
      ->check(number_in(1, 1 << 24));
  command.add_option("-c,--ctx", options.ctx, "longest prompt plus answer, tokens")
      ->check(number_in(1, 1 << 24))
      ->default_str("4096, or the model's limit if lower");
  add_sampling_options(command, options.sampling);
  command.add_option("--stop", options.stop, "stop before this text; may be repeated")
      ->check(not_empty())
      ->take_all()
      ->allow_extra_args(false);
  command.add_option("--system", options.system, "system text");
  command.add_option("--template", options.chat_template, "chat template to use")
      ->check(CLI::IsMember(chat_template_names()))
      ->default_str("the model's own");
  command.add_flag("--think", options.think, "let a thinking model think (its default)");
  command.add_flag("--no-think", options.no_think, "answer without thinking");
  command.add_option("--date", options.date, "date in the system block of Llama 3.1 and later")
      ->capture_default_str();
  command.add_flag("--parse-special", options.parse_special,
                   "special tokens written in the prompt are obeyed");
  command.add_flag("--show-special", options.show_special, "print special tokens");
  command.add_flag("--ignore-eos", options.ignore_eos, "do not stop at end-of-turn tokens");
  command.add_flag("-q,--quiet", options.quiet, "no notes on stderr");
  command.add_flag("-v,--verbose", options.verbose, "sampling values and speed on stderr");
  add_device_options(command, options.device, true);
}

}  // namespace

void add_run_command(CLI::App& app) {
  auto options = std::make_shared<RunOptions>();
  CLI::App* command = app.add_subcommand("run", "generate text from a prompt");
  add_common_options(*command, *options);
  command->add_option("prompt", options->prompt, "the prompt; - reads it from stdin");
  command->add_option("-f,--file", options->file, "read the prompt from a file");
  command->add_flag("--raw", options->raw, "no chat template: continue the text as it is");
  command->add_flag("--print-prompt", options->print_prompt, "show the rendered prompt on stderr");
  command->add_flag("--json", options->json, "one JSON object on stdout");
  command->callback([options] { run(*options); });
}

void add_chat_command(CLI::App& app) {
  auto options = std::make_shared<RunOptions>();
  CLI::App* command = app.add_subcommand("chat", "talk, one line a turn; ends with the input");
  add_common_options(*command, *options);
  command->callback([options] { chat(*options); });
}

}  // namespace tq
