// calibration_text - the text of a --calib file: prose, JSON lines, or a JSON list.
#pragma once

#include <string>
#include <string_view>

namespace tq {

/// What a calibration file says. A file is JSON if its content is: lines that are objects, or one
/// list of objects, with a "text" each (or a list of strings); the texts are joined as paragraphs.
/// Any other file is prose. Throws kBadData, naming the line, for JSON without texts, and for a
/// file named .json, .jsonl or .ndjson (in any case) that is not JSON.
std::string calibration_text(std::string_view content, const std::string& path);

/// Whether a text is JSON lines or a JSON document, by its content.
bool looks_like_json(std::string_view content);

}  // namespace tq
