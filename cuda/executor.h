// executor - which kernels are launched for a list of recorded operations.
//
// Looks for neighbours that one kernel does together: a norm or a SwiGLU before the linears that
// read it (rows.cu), a sum behind them, everything that happens to heads before attention
// (heads.cu), linears that share an input (packed_matvec.cu, packed_gemm.cu). Each intermediate
// that the bridge promises is still written. Not here: when (queue.cpp). Read next: executor.cpp.
#pragma once

#include <span>

#include "cuda/kernels.h"

namespace tq::cuda {

/// Carves aligned arrays out of one piece of memory. Without memory it only counts.
class Arena {
 public:
  explicit Arena(uint8_t* base) : base_(base) {}
  template <typename T>
  T* take(int64_t count) {
    uint8_t* at = base_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return reinterpret_cast<T*>(at);
  }
  bool counting() const { return base_ == nullptr; }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

/// cos and sin of positions [0, n), computed once.
struct RopeAngles {
  RopeTable table;
  int64_t n_positions = 0;
  DeviceMemory memory;  // float2 [n_positions, head_dim / 2]
};

class Executor {
 public:
  explicit Executor(const Gpu& gpu) : gpu_(gpu) {}
  /// Working memory for the list; true if it moved (graphs point into it).
  bool reserve(std::span<const Op> ops, int64_t max_keys);
  void launch(std::span<const Op> ops, const StepInput* input, int64_t max_keys);

 private:
  // Each takes the operations it can do at the front of `ops` and says how many they were.
  size_t run(std::span<const Op> ops, Arena arena);
  size_t run_rows(std::span<const Op> ops, Arena& arena);
  size_t run_heads(std::span<const Op> ops, Arena& arena);
  void run_attention(const Op& op, const HeadsJob& heads, bool heads_wanted, Arena& arena);
  void run_transform(const Op& op, Arena& arena);

  const Gpu& gpu_;
  DeviceMemory memory_;
  DeviceMemory counters_;  // of attention_decode.cu
  const StepInput* input_ = nullptr;
  int64_t max_keys_ = 0;
  int64_t counted_ = 0;
};

}  // namespace tq::cuda
