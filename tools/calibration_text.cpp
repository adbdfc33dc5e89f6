// calibration_text - see calibration_text.h.
#include "tools/calibration_text.h"

#include <algorithm>
#include <filesystem>
#include <optional>

#include "model/error.h"
#include "model/json.h"

namespace tq {
namespace {

bool is_blank(std::string_view line) {
  return line.find_first_not_of(" \t\r\n") == std::string_view::npos;
}

// fn(line, number) for every line that is not blank, until it returns false.
template <typename Function>
void for_lines(std::string_view text, const Function& fn) {
  size_t number = 1;
  for (size_t begin = 0; begin < text.size(); ++number) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = text.substr(begin, end - begin);
    begin = end + 1;
    if (!is_blank(line) && !fn(line, number)) return;
  }
}

std::optional<Json> try_json(std::string_view text) {
  try {
    return parse_json(text, "");
  } catch (const Error&) {
    return std::nullopt;
  }
}

bool named_json(const std::string& path) {
  std::string ending = std::filesystem::path(path).extension().string();
  for (char& c : ending) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
  return ending == ".json" || ending == ".jsonl" || ending == ".ndjson";
}

// A text that begins as an object or a list does. Most prose is told apart here.
bool begins_like_json(std::string_view content) {
  const size_t first = content.find_first_not_of(" \t\r\n");
  return first != std::string_view::npos && (content[first] == '{' || content[first] == '[');
}

// The first line is an object of its own.
bool is_json_lines(std::string_view content) {
  bool object = false;
  for_lines(content, [&](std::string_view line, size_t) {
    const std::optional<Json> json = try_json(line);
    object = json && json->is_object();
    return false;
  });
  return object;
}

class Paragraphs {
 public:
  void add(const std::string& text) { joined_ += (joined_.empty() ? "" : "\n\n") + text; }
  std::string take() { return std::move(joined_); }

 private:
  std::string joined_;
};

std::string texts_of_lines(std::string_view content, const std::string& path) {
  Paragraphs paragraphs;
  for_lines(content, [&](std::string_view line, size_t number) {
    const std::string where = path + ", line " + std::to_string(number);
    paragraphs.add(require_string(parse_json(line, where), "text", where));
    return true;
  });
  return paragraphs.take();
}

std::string texts_of_document(const Json& json, const std::string& path) {
  if (json.is_object()) return require_string(json, "text", path);
  Paragraphs paragraphs;
  size_t index = 0;
  for (const Json& item : json) {
    const std::string where = path + ", item " + std::to_string(index++);
    paragraphs.add(item.is_string() ? item.get<std::string>()
                                    : require_string(item, "text", where));
  }
  return paragraphs.take();
}

// A list of numbers is how a footnote may begin; a list of texts is not.
bool is_list_of_texts(const Json& json) {
  return json.is_array() && !json.empty() && (json[0].is_object() || json[0].is_string());
}

}  // namespace

bool looks_like_json(std::string_view content) {
  if (!begins_like_json(content)) return false;
  if (is_json_lines(content)) return true;
  const std::optional<Json> document = try_json(content);
  return document && (document->is_object() || is_list_of_texts(*document));
}

std::string calibration_text(std::string_view content, const std::string& path) {
  if (content.starts_with("\xEF\xBB\xBF")) content.remove_prefix(3);  // of Windows editors
  if (begins_like_json(content)) {
    const std::optional<Json> document = try_json(content);
    if (document && (named_json(path) || document->is_object() || is_list_of_texts(*document))) {
      return texts_of_document(*document, path);
    }
    if (is_json_lines(content)) return texts_of_lines(content, path);
  }
  // The name promises JSON: say what is wrong with it.
  if (named_json(path) && !is_blank(content)) return texts_of_lines(content, path);
  return std::string(content);
}

}  // namespace tq
