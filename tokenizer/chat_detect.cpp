// chat_detect - which chat template a model folder carries.
//
// A template is a program; we do not run it. A text that we know byte for byte is recognised by
// its hash. Qwen3's and Llama-3's exist in many revisions that differ in their tool parts only:
// those are recognised by the statements that shape a dialogue without tools, and refused when
// they hold a statement of a family that writes dialogues differently.
#include <cstdint>
#include <initializer_list>

#include "model/error.h"
#include "model/json.h"
#include "tokenizer/chat.h"
#include "tokenizer/component.h"

namespace tq {
namespace {

// FNV-1a, 64 bit. Not a security measure: whoever writes the template also writes the weights.
uint64_t fingerprint(std::string_view text) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
  return hash;
}

struct KnownText {
  uint64_t hash;
  ChatKind kind;
};

// Printed by tools/make_tokenizer_fixtures.py.
constexpr KnownText kKnownTexts[] = {
    {0x45EC583D4D25BC3A, ChatKind::kChatMLSmol},
};

bool has_all(std::string_view text, std::initializer_list<std::string_view> parts) {
  for (const std::string_view part : parts) {
    if (text.find(part) == std::string_view::npos) return false;
  }
  return true;
}

bool has_any(std::string_view text, std::initializer_list<std::string_view> parts) {
  for (const std::string_view part : parts) {
    if (text.find(part) != std::string_view::npos) return true;
  }
  return false;
}

// In these raw strings \n is a backslash and an n, as in the template's own string literals.
ChatKind qwen3_kind(std::string_view text) {
  // What all of Qwen3 shares: no default system text, system and user lines, the answer's opening.
  if (!has_all(
          text,
          {R"({{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }})",
           R"((message.role == "user") or (message.role == "system" and not loop.first))",
           R"({{- '<|im_start|>' + message.role + '\n')", "{%- if add_generation_prompt %}"})) {
    return ChatKind::kUnknown;
  }
  // Qwen2.5 (default system text), vision models, Qwen3.5, other families.
  if (has_any(text, {"You are Qwen", "image", "video", "vision", "xml", "strftime_now",
                     "raise_exception", "preserve_thinking"})) {
    return ChatKind::kUnknown;
  }
  const bool hybrid = has_any(text, {"enable_thinking"});
  const bool empty_block = has_all(text, {"enable_thinking is defined and enable_thinking is false",
                                          R"('<think>\n\n</think>\n\n')"});
  const bool opens_thinking = has_any(text, {R"('<|im_start|>assistant\n<think>\n')"});
  const bool opens_plainly = has_any(text, {R"({{- '<|im_start|>assistant\n' }})"});
  // Thoughts of the past: cut before the last query, written out after it.
  const bool keeps_last_thoughts = has_all(text, {"last_query_index", R"('</think>' in )",
                                                  "loop.index0 > ns.last_query_index"}) &&
                                   has_any(text, {R"(.split('</think>')[-1].lstrip('\n'))",
                                                  R"(.split('</think>')|last).lstrip('\n'))"});
  if (hybrid) {
    const bool other_literal = has_any(text, {R"('<think>\n')", R"("<think>\n")"});
    return empty_block && opens_plainly && !opens_thinking && keeps_last_thoughts && !other_literal
               ? ChatKind::kQwen3
               : ChatKind::kUnknown;
  }
  if (opens_thinking) {
    return keeps_last_thoughts && !opens_plainly ? ChatKind::kQwen3Thinking : ChatKind::kUnknown;
  }
  return opens_plainly ? ChatKind::kQwen3Instruct : ChatKind::kUnknown;
}

ChatKind llama3_kind(std::string_view text) {
  if (has_all(text, {R"("Cutting Knowledge Date: December 2023\n")",
                     R"("Today Date: " + date_string + "\n\n")",
                     R"("<|start_header_id|>system<|end_header_id|>\n\n")",
                     R"('<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ )"
                     "message['content'] | trim + '<|eot_id|>'",
                     R"('<|start_header_id|>assistant<|end_header_id|>\n\n')",
                     R"(set system_message = messages[0]['content']|trim)", "{{- bos_token }}"}) &&
      !has_any(text, {"image", R"(set system_message = "You)"})) {
    return ChatKind::kLlama31;
  }
  // 3.0 writes the line breaks themselves.
  if (has_all(text, {"{% set content = '<|start_header_id|>' + message['role'] + "
                     "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}",
                     "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}",
                     "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"}) &&
      !has_any(text, {"tools", "date", "if loop.first", "messages[0]"})) {
    return ChatKind::kLlama30;
  }
  return ChatKind::kUnknown;
}

// chat_template is a string, or a list of {"name", "template"} of which "default" counts.
std::optional<std::string> template_of_config(const std::string& text, const std::string& where) {
  if (text.empty()) return std::nullopt;
  const Json config = parse_json(text, where);
  if (!config.is_object()) bad_tokenizer("tokenizer_config.json", where, "must be an object");
  const Json* value = member(config, "chat_template");
  if (!value) return std::nullopt;
  if (value->is_string()) return value->get<std::string>();
  if (!value->is_array()) bad_tokenizer("chat_template", where, "must be a string or a list");
  for (const Json& entry : *value) {
    if (!entry.is_object()) bad_tokenizer("chat_template", where, "must list objects");
    if (require_string(entry, "name", where) == "default") {
      return require_string(entry, "template", where);
    }
  }
  return std::nullopt;
}

constexpr ChatKind kRenderedKinds[] = {ChatKind::kChatMLSmol,    ChatKind::kQwen3,
                                       ChatKind::kQwen3Instruct, ChatKind::kQwen3Thinking,
                                       ChatKind::kLlama30,       ChatKind::kLlama31};

// Jinja drops one line break at the end of a template.
std::string_view without_last_newline(std::string_view text) {
  if (text.ends_with('\n')) text.remove_suffix(1);
  return text;
}

}  // namespace

ChatKind detect_chat_kind(const ModelTexts& texts, const std::string& where) {
  const std::optional<std::string> config = template_of_config(texts.tokenizer_config, where);
  const std::string& file = texts.chat_template;
  if (!config && file.empty()) return ChatKind::kNone;
  if (config && !file.empty() && without_last_newline(*config) != without_last_newline(file)) {
    bad_tokenizer("chat template", where,
                  "chat_template.jinja and tokenizer_config.json have different ones");
  }
  const std::string_view text = without_last_newline(config ? *config : file);
  for (const KnownText& known : kKnownTexts) {
    if (known.hash == fingerprint(text)) return known.kind;
  }
  if (text.find("<|im_start|>") != std::string_view::npos) return qwen3_kind(text);
  if (text.find("<|start_header_id|>") != std::string_view::npos) return llama3_kind(text);
  return ChatKind::kUnknown;
}

const char* chat_kind_name(ChatKind kind) {
  switch (kind) {
    case ChatKind::kNone:
      return "none";
    case ChatKind::kUnknown:
      return "unknown";
    case ChatKind::kChatMLSmol:
      return "chatml-smollm2";
    case ChatKind::kQwen3:
      return "qwen3";
    case ChatKind::kQwen3Instruct:
      return "qwen3-instruct";
    case ChatKind::kQwen3Thinking:
      return "qwen3-thinking";
    case ChatKind::kLlama30:
      return "llama-3.0";
    case ChatKind::kLlama31:
      return "llama-3.1";
  }
  return "?";
}

std::vector<std::string> chat_template_names() {
  std::vector<std::string> names;
  for (const ChatKind kind : kRenderedKinds) names.push_back(chat_kind_name(kind));
  return names;
}

ChatKind chat_kind_of_name(const std::string& name) {
  for (const ChatKind kind : kRenderedKinds) {
    if (name == chat_kind_name(kind)) return kind;
  }
  return ChatKind::kUnknown;
}

}  // namespace tq
