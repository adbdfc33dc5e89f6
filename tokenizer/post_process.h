// post_process - the "post_processor" of tokenizer.json: which special ids go before and after.
//
// TemplateProcessing for a single text, ByteLevel (moves offsets only), and sequences of them.
// The pair template is not used: tq encodes one text at a time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/json.h"

namespace tq {

struct PostProcessor {
  std::vector<int32_t> before, after;

  /// `json` may be null. Ids must be below `n_ids`. Throws Error(kBadData).
  static PostProcessor from_json(const Json* json, int64_t n_ids, const std::string& where);
};

}  // namespace tq
