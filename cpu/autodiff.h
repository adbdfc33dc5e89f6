// autodiff - a tape of operations over whole f32 tensors; backward() gives the gradients.
//
// Used to learn rotations, low-rank factors and scales on the CPU; the runtime never links it into
// a forward pass. A value lives as long as a Var holds it or a backward step needs it: a Var that
// is assigned, moved from or out of scope frees its memory (unnamed Vars of one expression live to
// its end). Results depend on neither the number of threads nor the instruction set. Not here: the
// operations (autodiff_ops.h, autodiff_rounding.h, autodiff_model.h), optimisers.
//
//   std::vector<float> q = ..., q_gradient(n * n);             // zeroed by the caller
//   Tape tape(kernels_for(best_isa()), n_threads);
//   Var w = tape.constant({1, out, n}, weights.data());         // views: no copy
//   Var x = tape.constant({1, tokens, n}, inputs.data());
//   Var basis = tape.parameter({1, n, n}, q.data(), q_gradient.data());
//   Var y = matmul_nt(matmul_nn(x, basis), round_groups(matmul_nn(w, basis), {.bits = 4}));
//   Var loss = relative_error(y, tape.constant({1, tokens, out}, target.data()));
//   loss.item();                                                // the number
//   tape.backward(loss);                                        // q_gradient += d loss / d q
//
// Read next: autodiff_ops.h; autodiff_node.h to write an operation.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

namespace tq {

/// Row-major [batch, rows, cols]. A batch is a stack of equal problems (layers, heads); where an
/// operation has two operands, one of batch 1 serves the whole batch of the other.
struct Shape {
  int64_t batch = 1, rows = 1, cols = 1;
  int64_t matrix() const { return rows * cols; }
  int64_t size() const { return batch * rows * cols; }
  bool operator==(const Shape&) const = default;
};

/// Bytes of tensors that a tape (with the tapes inside it) holds.
struct TapeMemory {
  int64_t bytes = 0, peak_bytes = 0;
};

/// Either a view of the caller's memory or a share of memory that is freed with its last Tensor.
class Tensor {
 public:
  Tensor() = default;
  Tensor(Shape shape, const float* view) : shape_(shape), data_(view) {}
  /// Owned and not initialised.
  Tensor(Shape shape, const std::shared_ptr<TapeMemory>& memory);
  const Shape& shape() const { return shape_; }
  int64_t size() const { return shape_.size(); }
  const float* data() const { return data_; }
  float* own() { return owned_.get(); }  // null for a view
  bool exists() const { return data_ != nullptr; }
  bool sole_owner() const { return owned_.use_count() == 1; }
  /// The same elements under another shape of equal size.
  Tensor reshaped(Shape shape) const;

 private:
  Shape shape_;
  const float* data_ = nullptr;
  std::shared_ptr<float> owned_;
};

class Tape;
constexpr int32_t kNoNode = -1;

/// A tensor on a tape. Copies share the value.
class Var {
 public:
  Var() = default;
  Var(Tape& tape, Tensor value, int32_t node)
      : tape_(&tape), value_(std::move(value)), node_(node) {}
  const Shape& shape() const { return value_.shape(); }
  const Tensor& value() const { return value_; }
  const float* data() const { return value_.data(); }
  float item() const;  // of a [1, 1, 1]
  bool needs_gradient() const { return node_ != kNoNode; }
  Tape& tape() const { return *tape_; }
  int32_t node() const { return node_; }

 private:
  Tape* tape_ = nullptr;
  Tensor value_;
  int32_t node_ = kNoNode;
};

class Tape {
 public:
  Tape(const Kernels& kernels, int n_threads);
  Tape(const Tape&) = delete;
  ~Tape();

  /// Leaves: views of memory that outlives the tape.
  Var constant(Shape shape, const float* data);
  /// backward() adds d loss / d data to `gradient`, of the same shape.
  Var parameter(Shape shape, const float* data, float* gradient);

  /// Adds the gradient of a [1, 1, 1] to every parameter it depends on, and empties the tape: it
  /// may be filled again, but not with operations on Vars from before.
  void backward(const Var& loss);
  /// Same for any shape, from d loss / d output.
  void backward(const Var& output, Tensor gradient);

  const Kernels& kernels() const { return kernels_; }
  int n_threads() const { return n_threads_; }
  /// Tensors held at the same time so far, parameters and constants not counted.
  int64_t peak_bytes() const { return memory_->peak_bytes; }
  int64_t bytes() const { return memory_->bytes; }

 private:
  friend class TapeAccess;
  friend class Gradients;
  struct Node;
  Tape(const Tape& outer, bool recording);
  void run_backward(int32_t output, Tensor gradient);

  const Kernels& kernels_;
  int n_threads_;
  bool recording_ = true;        // otherwise no operation is remembered
  bool has_parameters_ = false;  // parameter() was called
  std::shared_ptr<TapeMemory> memory_;
  std::vector<Node> nodes_;
  int32_t n_forgotten_ = 0;  // nodes of earlier fillings; the first of nodes_ has this index
};

/// fn(tape, inputs) -> output, of which only inputs and output stay until backward(), where fn runs
/// again. fn may make leaves of its own on the tape it is given, must use no other Var than these
/// and its inputs, and must do the same both times.
using CheckpointBody = std::function<Var(Tape&, const std::vector<Var>&)>;
Var checkpoint(Tape& tape, const CheckpointBody& fn, const std::vector<Var>& inputs);

/// The same value, without a gradient.
Var detach(const Var& x);

}  // namespace tq
