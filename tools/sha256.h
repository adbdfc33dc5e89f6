// sha256 - names evaluation texts, so that results can be compared across machines.
#pragma once

#include <string>
#include <string_view>

namespace tq {

/// SHA-256 of `bytes`, 64 lower-case hex digits.
std::string sha256_hex(std::string_view bytes);

}  // namespace tq
