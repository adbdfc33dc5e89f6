// memory - how much more memory this process can have, for asking before allocating.
#pragma once

#include <cstdint>
#include <string>

namespace tq {

/// Bytes that can still be had: MemAvailable of the machine, what is left of the cgroup's limit and
/// of RLIMIT_AS, whichever is least. UINT64_MAX if nothing is known.
uint64_t available_memory();

/// "1.23 GB"
std::string gigabytes(double bytes);

}  // namespace tq
