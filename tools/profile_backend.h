// profile_backend - a backend that passes every operation on to another one and times it.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "model/backend.h"

namespace tq {

struct OpTime {
  double seconds = 0;
  int64_t calls = 0;
};

/// Wraps `inner` and waits for each operation: the sum is longer than a run without the wrapper,
/// where a GPU overlaps and fuses. `times` receives the totals by operation name and must outlive
/// the backend.
std::unique_ptr<Backend> make_profile_backend(std::unique_ptr<Backend> inner,
                                              std::map<std::string, OpTime>& times);

}  // namespace tq
