// chat - chat templates written out (Qwen3, Llama-3.x, ChatML of SmolLM2), stop tokens, sampling
// defaults. No Jinja engine: a template text that we do not know is reported, not guessed.
// Read next: chat.cpp (rendering), chat_detect.cpp, generation_defaults.cpp.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "model/weights.h"
#include "tokenizer/tokenizer.h"

namespace tq {

struct Message {
  std::string role;  // "system", "user", "assistant"
  std::string content;
};

enum class ChatKind {
  kNone,           // no template in the model folder: base model
  kUnknown,        // a template we do not know
  kChatMLSmol,     // SmolLM2: ChatML with its default system text
  kQwen3,          // hybrid thinking
  kQwen3Instruct,  // 2507 instruct: no thinking
  kQwen3Thinking,  // 2507 thinking: answer starts inside <think>
  kLlama30,
  kLlama31  // 3.1, 3.2, 3.3: date line in the system block
};

struct ChatOptions {
  bool think = true;                 // Qwen3: false inserts the empty think block
  std::string date = "26 Jul 2024";  // Llama-3.1 system block; constant for reproducibility
};

/// Recognises the model's template from tokenizer_config.json (string, or list with "default") or
/// chat_template.jinja. Throws kBadData if both exist and differ.
ChatKind detect_chat_kind(const ModelTexts& texts, const std::string& where);
const char* chat_kind_name(ChatKind kind);
/// Templates that can be rendered, by the names that chat_kind_name() gives them.
std::vector<std::string> chat_template_names();
/// The template of such a name; kUnknown for any other.
ChatKind chat_kind_of_name(const std::string& name);

/// The text the template renders, generation prompt included. For display and fixtures.
std::string render_chat(ChatKind kind, const std::vector<Message>& messages,
                        const ChatOptions& options);
/// The ids: scaffold with special tokens parsed, user content as plain text unless parse_special.
std::vector<int32_t> encode_chat(const Tokenizer& tokenizer, ChatKind kind,
                                 const std::vector<Message>& messages, const ChatOptions& options,
                                 bool parse_special);

/// A piece of text as a question (its first eighth) and the beginning of an answer, cut to the same
/// number of ids: calibration text as a chat would hold it. The template's tokens hardly occur in
/// plain text, yet stand at the start of every chat, where inputs are unlike all others. Text that
/// the template would not lengthen comes back as it was.
std::vector<int32_t> as_conversation(const Tokenizer& tokenizer, ChatKind kind,
                                     const std::vector<int32_t>& text);
/// Every second sample, from the first on, as a conversation; none without a known template.
void make_every_second_a_conversation(const Tokenizer& tokenizer, ChatKind kind,
                                      std::vector<std::vector<int32_t>>& samples);

/// Ids that end generation: the union of generation_config.eos_token_id, config.eos_token_id,
/// tokenizer_config.eos_token, and known end-of-turn names in the vocabulary.
std::vector<int32_t> stop_tokens(const ModelTexts& texts, const Config& config,
                                 const Tokenizer& tokenizer, const std::string& where);

/// What a user asks for; the rest is the model's.
struct SamplingWishes {
  std::optional<double> temperature, top_p, min_p, repetition_penalty;
  std::optional<int64_t> top_k;
  /// True if the user decides how to sample, whatever else the model's file asks for.
  bool any() const { return temperature || top_p || min_p || repetition_penalty || top_k; }
};

struct Sampling {
  double temperature = 0;  // 0 = greedy
  int64_t top_k = 0;       // 0 = off
  double top_p = 1.0;
  double min_p = 0;
  double repetition_penalty = 1.0;
  std::vector<std::string> notes;  // options of the model that are not followed, a sentence each
};
/// The wishes, over generation_config.json where present, else greedy. Only what counts is read:
/// greedy decoding has no top_k. Throws kBadData for a value out of range, and, where nothing is
/// wished, for options that tq does not have; with wishes those are notes.
Sampling sampling_of(const ModelTexts& texts, const SamplingWishes& wishes,
                     const std::string& where);

}  // namespace tq
