// config_tokens - what tokenizer_config.json adds to tokenizer.json: tokens and flags, as
// transformers' AutoTokenizer puts the two together.
//
// Older tools write tokens of a fine-tune only there. transformers numbers them itself, behind the
// last id; where the file says another id the two disagree, and that is an error. Read next:
// tokenizer.cpp.
#pragma once

#include <string>
#include <vector>

#include "model/json.h"
#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/post_process.h"

namespace tq {

/// Appends the tokens that `config`, a tokenizer_config.json, declares and `added` lacks, and
/// changes the flags of those it declares otherwise. `next_id`: behind the last id of
/// tokenizer.json. Throws Error(kBadData) naming `where`.
void add_config_tokens(const Json& config, const Bpe& bpe, int32_t next_id,
                       std::vector<AddedToken>& added, const std::string& where);

/// A sentence where the LlamaTokenizer of transformers 4, which goes by add_bos_token and
/// add_eos_token, would put other tokens around a text than tokenizer.json; else "".
std::string post_processor_note(const Json& config, const PostProcessor& processor,
                                const std::vector<AddedToken>& added);

}  // namespace tq
