// queue - see queue.h.
#include "cuda/queue.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "model/error.h"

namespace tq::cuda {
namespace {

// Longer steps are many large kernels: their launches hide behind each other.
constexpr int64_t kGraphRows = kMatvecRows;
constexpr size_t kMinGraphOps = 8;
constexpr size_t kMaxGraphs = 16;
// The device begins with so many operations of a step (two layers) while the host records the rest.
constexpr size_t kFirstOps = 24;
constexpr int64_t kFirstCapacity = 4096;  // tokens
// Attention is cut for at least this many keys, and for powers of two of them: each needs a graph
// of its own.
constexpr uint64_t kMinKeys = 256;

bool equal(const std::vector<Op>& a, const std::vector<Op>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(Op)) == 0;
}

// Rows are tokens in these; those of a norm may be heads.
bool few_tokens(const Op& op) {
  const bool counts = op.kind == OpKind::kEmbed || op.kind == OpKind::kLinears ||
                      op.kind == OpKind::kAttention || op.kind == OpKind::kCopyRows;
  return !counts || op.rows <= kGraphRows;
}

}  // namespace

Queue::Queue(int device, bool portable) {
  gpu_.facts = open_device(device);
  if (portable) gpu_.facts.major = 8, gpu_.facts.minor = 0;
  // Ordered after the default stream, where memory is cleared.
  cuda_check(cudaStreamCreate(&gpu_.stream), "creating a stream");
  cuda_check(cudaEventCreateWithFlags(&input_sent_, cudaEventDisableTiming), "creating an event");
  uploader_ = std::make_unique<Uploader>(gpu_.stream);
  executor_ = std::make_unique<Executor>(gpu_);
}

Queue::~Queue() {
  cudaStreamSynchronize(gpu_.stream);
  drop_graphs();
  cudaEventDestroy(input_sent_);
  cudaStreamDestroy(gpu_.stream);
}

void Queue::record(const Op& op) {
  // Where a layer begins: no two operations that one kernel does together are parted.
  if (!begun_ && ops_.size() >= kFirstOps && op.kind == OpKind::kRmsNorm &&
      ops_.back().kind == OpKind::kAdd && op.x == ops_.back().out) {
    flush();
    begun_ = true;
  }
  ops_.push_back(op);
}

void Queue::record_at(const Op& op, int64_t pos0, int64_t rows) {
  if (pos0_ >= 0 && pos0_ != pos0) flush();
  pos0_ = pos0;
  n_keys_ = std::max(n_keys_, pos0 + rows);
  record(op);
}

void Queue::record_tokens(const Op& op, std::span<const int32_t> tokens) {
  if (!tokens_.empty()) flush();
  tokens_.assign(tokens.begin(), tokens.end());
  record(op);
}

void Queue::flush() {
  if (ops_.empty()) return;
  const int64_t max_keys =
      static_cast<int64_t>(std::bit_ceil(std::max(static_cast<uint64_t>(n_keys_), kMinKeys)));
  try {
    send_input();
    const bool small = std::all_of(ops_.begin(), ops_.end(), few_tokens);
    if (small && ops_.size() >= kMinGraphOps) {
      run_graph(max_keys);
    } else {
      run_direct(max_keys);
    }
  } catch (...) {
    ops_.clear();  // what failed once must not be tried again by a destructor
    throw;
  }
  ops_.clear();
  tokens_.clear();
  pos0_ = -1;
  n_keys_ = 0;
  begun_ = false;
}

void Queue::wait() {
  flush();
  cuda_check(cudaStreamSynchronize(gpu_.stream), "waiting for the GPU");
}

void Queue::forget() noexcept {
  try {
    flush();
  } catch (...) {  // the next operation meets the same error and reports it
  }
  drop_graphs();
}

// Fills the pinned copy; the transfer itself is part of what is launched.
void Queue::send_input() {
  const int64_t n_tokens = static_cast<int64_t>(tokens_.size());
  const int32_t pos0 = static_cast<int32_t>(std::max<int64_t>(pos0_, 0));
  // The rest of a step: no need to wait for the part that is running.
  if (capacity_ > 0 && n_tokens == 0 && pinned_input_.as<StepInput>()->pos0 == pos0) return;
  cuda_check(cudaEventSynchronize(input_sent_), "waiting for the GPU");
  if (n_tokens > capacity_ || capacity_ == 0) {
    cuda_check(cudaStreamSynchronize(gpu_.stream), "waiting for the GPU");
    drop_graphs();
    capacity_ = std::max(kFirstCapacity, n_tokens);
    const int64_t bytes = static_cast<int64_t>(sizeof(StepInput)) + 4 * capacity_;
    input_ = DeviceMemory(bytes, "token ids");
    pinned_input_ = PinnedMemory(bytes);
  }
  StepInput* input = pinned_input_.as<StepInput>();
  input->pos0 = pos0;
  std::copy(tokens_.begin(), tokens_.end(), input->tokens);
}

void Queue::launch_copy_of_input() {
  const size_t bytes = sizeof(StepInput) + 4 * tokens_.size();
  cuda_check(cudaMemcpyAsync(input_.as<void>(), pinned_input_.as<void>(), bytes,
                             cudaMemcpyHostToDevice, gpu_.stream),
             "sending token ids");
}

void Queue::run_direct(int64_t max_keys) {
  if (executor_->reserve(ops_, max_keys)) drop_graphs();
  launch_copy_of_input();
  cuda_check(cudaEventRecord(input_sent_, gpu_.stream), "recording an event");
  executor_->launch(ops_, input_.as<StepInput>(), max_keys);
}

Queue::Graph* Queue::find_graph(int64_t max_keys) {
  for (auto it = graphs_.begin(); it != graphs_.end(); ++it) {
    if (it->max_keys != max_keys || !equal(it->ops, ops_)) continue;
    graphs_.splice(graphs_.begin(), graphs_, it);
    return &graphs_.front();
  }
  return nullptr;
}

void Queue::run_graph(int64_t max_keys) {
  Graph* graph = find_graph(max_keys);
  if (!graph) {  // the first time loads kernels and grows memory, which a capture must not
    run_direct(max_keys);
    if (graphs_.size() == kMaxGraphs) {
      if (graphs_.back().exec) cudaGraphExecDestroy(graphs_.back().exec);
      graphs_.pop_back();
    }
    graphs_.push_front({ops_, max_keys, nullptr});
    return;
  }
  if (!graph->exec) {
    cuda_check(cudaStreamBeginCapture(gpu_.stream, cudaStreamCaptureModeThreadLocal), "capturing");
    cudaGraph_t captured = nullptr;
    try {
      launch_copy_of_input();
      executor_->launch(ops_, input_.as<StepInput>(), max_keys);
    } catch (...) {
      cudaStreamEndCapture(gpu_.stream, &captured);
      if (captured) cudaGraphDestroy(captured);
      throw;
    }
    cuda_check(cudaStreamEndCapture(gpu_.stream, &captured), "capturing");
    const cudaError_t status = cudaGraphInstantiate(&graph->exec, captured, 0);
    cudaGraphDestroy(captured);
    cuda_check(status, "instantiating a graph");
  }
  cuda_check(cudaGraphLaunch(graph->exec, gpu_.stream), "launching a graph");
  cuda_check(cudaEventRecord(input_sent_, gpu_.stream), "recording an event");
}

void Queue::drop_graphs() noexcept {
  for (Graph& graph : graphs_) {
    if (graph.exec) cudaGraphExecDestroy(graph.exec);
  }
  graphs_.clear();
}

}  // namespace tq::cuda
