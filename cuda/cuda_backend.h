// cuda_backend - model/backend.h on an NVIDIA GPU (compute capability 8.0 or later): the door.
//
// No CUDA header here: tools/ and tests/ need none. Not here: how it works. Read next:
// cuda_backend.cpp (recording of operations), executor.cpp (what is launched for them).
#pragma once

#include <memory>
#include <string>

#include "model/backend.h"

namespace tq {

/// Opens GPU `index`. Throws kResource with one line saying what is missing. portable: with the
/// kernels of compute capability 8.0 on any GPU, so that tests reach them.
std::unique_ptr<Backend> make_cuda_backend(int index = 0, bool portable = false);

/// Whether make_cuda_backend() can work; if not, why.
bool cuda_usable(std::string& why, int index = 0);

/// Bytes per second that a kernel reads of memory too large for any cache: the limit of decoding.
double cuda_read_bandwidth(int index = 0);

}  // namespace tq
