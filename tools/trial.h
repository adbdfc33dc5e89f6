// trial - a finished .tq file runs a few tokens before it gets its name.
#pragma once

#include <string>

namespace tq {

/// Runs tokens from all over the vocabulary through the file at `path`, one layer in memory at a
/// time, on the CPU. Throws kBadData, naming `output`, if a number is not finite (with the first
/// layer behind which one is), or if a KV cache of 16 bits gives quite other logits than one of 32.
void try_finished_file(const std::string& path, const std::string& output, int threads);

}  // namespace tq
