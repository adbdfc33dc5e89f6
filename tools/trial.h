// trial - a finished .tq file runs a few tokens before it gets its name.
#pragma once

#include <string>

namespace tq {

/// Runs tokens from all over the vocabulary through the file at `path`, one layer in memory at a
/// time, on the CPU. Throws kBadData if a number is not finite, naming `output` and the first layer
/// behind which one is.
void try_finished_file(const std::string& path, const std::string& output, int threads);

}  // namespace tq
