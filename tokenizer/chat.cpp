// chat - the chat templates, written out; see chat.h. Recognising them: chat_detect.cpp. Stop
// tokens and sampling defaults: generation_defaults.cpp.
//
// A template is rendered as parts: special tokens of the scaffold, and text. Keeping them apart is
// what makes "<|im_end|>" typed by a user harmless. Text parts that touch are one part, because
// the tokenizer merges across them ("user\n" + "\n\nhello").
#include "tokenizer/chat.h"

#include <algorithm>

#include "model/error.h"
#include "tokenizer/utf8.h"

namespace tq {
namespace {

struct Part {
  bool token;  // a special token of the scaffold
  std::string text;
};

class Parts {
 public:
  void token(const char* text) { parts_.push_back({true, text}); }
  void text(std::string_view text) {
    if (text.empty()) return;
    if (parts_.empty() || parts_.back().token) parts_.push_back({false, ""});
    parts_.back().text += text;
  }
  const std::vector<Part>& list() const { return parts_; }

 private:
  std::vector<Part> parts_;
};

constexpr const char* kSmolSystem =
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face";

// Python's str.strip() without arguments, which Jinja's `trim` is.
bool is_python_space(char32_t code) {
  return is_white_space(code) || (code >= 0x1C && code <= 0x1F);
}

std::string_view trim(std::string_view text) {
  while (!text.empty()) {
    const Utf8Unit unit = utf8_at(text, 0);
    if (!is_python_space(unit.code)) break;
    text.remove_prefix(unit.length);
  }
  while (!text.empty()) {
    size_t last = text.size() - 1;
    while (last > 0 && (static_cast<unsigned char>(text[last]) & 0xC0) == 0x80) --last;
    if (!is_python_space(utf8_at(text, last).code)) break;
    text.remove_suffix(text.size() - last);
  }
  return text;
}

std::string_view strip_newlines(std::string_view text, bool left, bool right) {
  while (left && !text.empty() && text.front() == '\n') text.remove_prefix(1);
  while (right && !text.empty() && text.back() == '\n') text.remove_suffix(1);
  return text;
}

// <|im_start|>role\ncontent<|im_end|>\n
void chatml_message(Parts& parts, std::string_view role, std::string_view content) {
  parts.token("<|im_start|>");
  parts.text(role);
  parts.text("\n");
  parts.text(content);
  parts.token("<|im_end|>");
  parts.text("\n");
}

void chatml_open_answer(Parts& parts) {
  parts.token("<|im_start|>");
  parts.text("assistant\n");
}

void think_block(Parts& parts, std::string_view thoughts) {
  parts.token("<think>");
  parts.text("\n");
  parts.text(thoughts);
  parts.text("\n");
  parts.token("</think>");
  parts.text("\n\n");
}

void render_smol(Parts& parts, const std::vector<Message>& messages) {
  if (messages[0].role != "system") chatml_message(parts, "system", kSmolSystem);
  for (const Message& message : messages) chatml_message(parts, message.role, message.content);
  chatml_open_answer(parts);
}

// The last message that a person wrote; results of tools come in the user's name as well.
size_t last_query(const std::vector<Message>& messages) {
  constexpr std::string_view kOpen = "<tool_response>", kClose = "</tool_response>";
  for (size_t i = messages.size(); i-- > 0;) {
    const std::string& text = messages[i].content;
    const bool tool = text.starts_with(kOpen) && text.ends_with(kClose);
    if (messages[i].role == "user" && !tool) return i;
  }
  return messages.size() - 1;
}

// An answer of the past: thoughts before the last query are dropped, later ones are kept.
void qwen3_answer(Parts& parts, const std::string& text, bool after_query, bool last) {
  constexpr std::string_view kOpen = "<think>", kClose = "</think>";
  std::string_view content = text, thoughts;
  if (const size_t close = text.rfind(kClose); close != std::string::npos) {
    content = strip_newlines(std::string_view(text).substr(close + kClose.size()), true, false);
    thoughts = std::string_view(text).substr(0, text.find(kClose));
    thoughts = strip_newlines(thoughts, false, true);
    if (const size_t open = thoughts.rfind(kOpen); open != std::string_view::npos) {
      thoughts.remove_prefix(open + kOpen.size());
    }
    thoughts = strip_newlines(thoughts, true, false);
  }
  parts.token("<|im_start|>");
  parts.text("assistant\n");
  if (after_query && (last || !thoughts.empty())) {
    think_block(parts, strip_newlines(thoughts, true, true));
    content = strip_newlines(content, true, false);
  }
  parts.text(content);
  parts.token("<|im_end|>");
  parts.text("\n");
}

void render_qwen3(Parts& parts, ChatKind kind, const std::vector<Message>& messages,
                  const ChatOptions& options) {
  const size_t query = last_query(messages);
  for (size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].role == "assistant") {
      qwen3_answer(parts, messages[i].content, i > query, i + 1 == messages.size());
    } else {
      chatml_message(parts, messages[i].role, messages[i].content);
    }
  }
  chatml_open_answer(parts);
  if (kind == ChatKind::kQwen3Thinking) {
    parts.token("<think>");
    parts.text("\n");
  } else if (!options.think) {
    think_block(parts, "");
  }
}

// The published variants of this template differ only in answers with thoughts and in a dialogue
// that does not end with the user; both are refused.
void render_qwen3_instruct(Parts& parts, const std::vector<Message>& messages) {
  for (const Message& message : messages) {
    if (message.role == "assistant" && message.content.find("</think>") != std::string::npos) {
      throw Error(ErrorKind::kBadData, "chat message", "assistant",
                  "has thoughts, but this model does not think");
    }
    chatml_message(parts, message.role, message.content);
  }
  if (messages.back().role != "user") {
    throw Error(ErrorKind::kBadData, "chat", "last message", "must come from the user");
  }
  chatml_open_answer(parts);
}

void llama_header(Parts& parts, std::string_view role) {
  parts.token("<|start_header_id|>");
  parts.text(role);
  parts.token("<|end_header_id|>");
  parts.text("\n\n");
}

void render_llama(Parts& parts, ChatKind kind, const std::vector<Message>& messages,
                  const ChatOptions& options) {
  parts.token("<|begin_of_text|>");
  size_t first = 0;
  if (kind == ChatKind::kLlama31) {
    llama_header(parts, "system");
    parts.text("Cutting Knowledge Date: December 2023\nToday Date: " + options.date + "\n\n");
    if (messages[0].role == "system") {
      parts.text(trim(messages[0].content));
      first = 1;
    }
    parts.token("<|eot_id|>");
  }
  for (size_t i = first; i < messages.size(); ++i) {
    llama_header(parts, messages[i].role);
    parts.text(trim(messages[i].content));
    parts.token("<|eot_id|>");
  }
  llama_header(parts, "assistant");
}

void check_messages(const std::vector<Message>& messages) {
  if (messages.empty()) throw Error(ErrorKind::kBadData, "chat", "messages", "there are none");
  for (size_t i = 0; i < messages.size(); ++i) {
    const Message& message = messages[i];
    const std::string where = "message " + std::to_string(i + 1);
    if (message.role != "system" && message.role != "user" && message.role != "assistant") {
      throw Error(ErrorKind::kBadData, "chat role '" + message.role + "'", where,
                  "known: system, user, assistant");
    }
    if (!is_valid_utf8(message.content)) {
      throw Error(ErrorKind::kBadData, "chat", where, "is not valid UTF-8");
    }
  }
}

std::vector<Part> render_parts(ChatKind kind, const std::vector<Message>& messages,
                               const ChatOptions& options) {
  check_messages(messages);
  Parts parts;
  switch (kind) {
    case ChatKind::kNone:
    case ChatKind::kUnknown:
      throw Error(ErrorKind::kBadData, "chat template", chat_kind_name(kind), "cannot be applied",
                  "use the raw prompt");
    case ChatKind::kChatMLSmol:
      render_smol(parts, messages);
      break;
    case ChatKind::kQwen3:
    case ChatKind::kQwen3Thinking:
      render_qwen3(parts, kind, messages, options);
      break;
    case ChatKind::kQwen3Instruct:
      render_qwen3_instruct(parts, messages);
      break;
    case ChatKind::kLlama30:
    case ChatKind::kLlama31:
      render_llama(parts, kind, messages, options);
      break;
  }
  return parts.list();
}

}  // namespace

std::string render_chat(ChatKind kind, const std::vector<Message>& messages,
                        const ChatOptions& options) {
  std::string text;
  for (const Part& part : render_parts(kind, messages, options)) text += part.text;
  return text;
}

std::vector<int32_t> encode_chat(const Tokenizer& tokenizer, ChatKind kind,
                                 const std::vector<Message>& messages, const ChatOptions& options,
                                 bool parse_special) {
  if (parse_special) return tokenizer.encode(render_chat(kind, messages, options), false, true);
  std::vector<int32_t> ids;
  for (const Part& part : render_parts(kind, messages, options)) {
    if (part.token) {
      const std::optional<int32_t> id = tokenizer.id_of(part.text);
      if (!id) {
        throw Error(ErrorKind::kBadData, "chat template", chat_kind_name(kind),
                    "needs the token '" + part.text + "', which the tokenizer does not have");
      }
      ids.push_back(*id);
    } else {
      const std::vector<int32_t> more = tokenizer.encode(part.text, false, false);
      ids.insert(ids.end(), more.begin(), more.end());
    }
  }
  return ids;
}

std::vector<int32_t> as_conversation(const Tokenizer& tokenizer, ChatKind kind,
                                     const std::vector<int32_t>& text) {
  const size_t question = text.size() / 8;
  const std::string user =
      replace_invalid_utf8(tokenizer.decode(std::span(text).first(question), true));
  std::vector<int32_t> ids = encode_chat(tokenizer, kind, {{"user", user}}, {}, false);
  ids.insert(ids.end(), text.begin() + static_cast<std::ptrdiff_t>(question), text.end());
  if (ids.size() < text.size()) return text;
  ids.resize(text.size());
  return ids;
}

void make_every_second_a_conversation(const Tokenizer& tokenizer, ChatKind kind,
                                      std::vector<std::vector<int32_t>>& samples) {
  if (kind == ChatKind::kNone || kind == ChatKind::kUnknown) return;
  for (size_t i = 0; i < samples.size(); i += 2) {
    samples[i] = as_conversation(tokenizer, kind, samples[i]);
  }
}

}  // namespace tq
