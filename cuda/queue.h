// queue - recorded operations, until they are launched; replays lists that repeat as CUDA graphs.
//
// A decode step is hundreds of small kernels whose launches cost the CPU more than their work costs
// the GPU. One token's list equals the next one's but for position and token id, which stand in
// device memory (ops.h, StepInput), so it is captured once and launched as one graph.
// Not here: what is launched for an operation (executor.cpp).
#pragma once

#include <list>
#include <memory>
#include <span>
#include <vector>

#include "cuda/executor.h"

namespace tq::cuda {

class Queue {
 public:
  /// portable: launches what a GPU of compute capability 8.0 can do.
  explicit Queue(int device, bool portable = false);
  ~Queue();
  Queue(const Queue&) = delete;
  const Gpu& gpu() const { return gpu_; }
  Uploader& uploader() { return *uploader_; }

  /// Appends an operation that reads no position.
  void record(const Op& op);
  /// Appends one whose rows are at positions pos0.. .
  void record_at(const Op& op, int64_t pos0, int64_t rows);
  /// Appends one that reads token ids.
  void record_tokens(const Op& op, std::span<const int32_t> tokens);
  /// Launches everything recorded; does not wait.
  void flush();
  /// Launches and waits.
  void wait();
  /// Something that operations and graphs may refer to is about to go.
  void forget() noexcept;

 private:
  struct Graph {
    std::vector<Op> ops;
    int64_t max_keys = 0;
    cudaGraphExec_t exec = nullptr;  // null: seen once, run without a graph
  };
  void send_input();
  void drop_graphs() noexcept;
  Graph* find_graph(int64_t max_keys);
  void run_direct(int64_t max_keys);
  void run_graph(int64_t max_keys);
  void launch_copy_of_input();

  Gpu gpu_;
  std::unique_ptr<Uploader> uploader_;
  std::unique_ptr<Executor> executor_;
  std::vector<Op> ops_;
  int64_t pos0_ = -1, n_keys_ = 0;
  bool begun_ = false;  // the first operations of the step are on their way
  std::vector<int32_t> tokens_;
  DeviceMemory input_;  // StepInput with room for `capacity_` tokens
  PinnedMemory pinned_input_;
  int64_t capacity_ = 0;
  cudaEvent_t input_sent_ = nullptr;
  std::list<Graph> graphs_;  // most recently used first
};

/// Member of everything that recorded operations may point to.
class Lifetime {
 public:
  explicit Lifetime(std::shared_ptr<Queue> queue) : queue_(std::move(queue)) {}
  ~Lifetime() {
    if (queue_) queue_->forget();
  }
  Lifetime(const Lifetime&) = delete;
  Lifetime& operator=(const Lifetime&) = delete;
  Queue& queue() const { return *queue_; }

 private:
  std::shared_ptr<Queue> queue_;
};

}  // namespace tq::cuda
