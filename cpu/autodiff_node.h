// autodiff_node - what an operation is made of: its value, and a step that passes gradients back.
//
// Included by cpu/autodiff_*.cpp only; users need autodiff.h. An operation computes its value into
// new_tensor(), then calls new_var() with its inputs and a BackwardStep that captures what it needs
// of them: only captured tensors stay in memory. Read next: autodiff_ops.cpp (the plainest ones).
#pragma once

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "cpu/autodiff.h"
#include "cpu/parallel.h"
#include "model/error.h"

namespace tq {

/// Where a gradient goes. The memory is not initialised unless `accumulate`.
struct GradientTarget {
  float* data;
  bool accumulate;
};

/// The gradients of a step's inputs. A node that needs none is kNoNode and must not be asked for.
class Gradients {
 public:
  explicit Gradients(Tape& tape) : tape_(tape) {}
  /// Adds a whole gradient; becomes the gradient without a copy if it owns its memory and is first.
  void add(int32_t node, Tensor gradient);
  /// For a step that writes or adds its gradient itself.
  GradientTarget target(int32_t node);
  /// Same, set to zero if it was not initialised: for a step that can only add.
  float* sum(int32_t node);
  Tape& tape() const { return tape_; }

 private:
  Tape& tape_;
};

/// Passes d loss / d value back. Owns `gradient` and may use its memory.
using BackwardStep = std::function<void(Tensor gradient, Gradients& out)>;

struct Tape::Node {
  Shape shape;
  BackwardStep step;                    // empty for a leaf
  float* parameter_gradient = nullptr;  // the caller's, of a leaf
  Tensor gradient;                      // of other nodes, once there is one
};

class TapeAccess {
 public:
  static const std::shared_ptr<TapeMemory>& memory(const Tape& tape) { return tape.memory_; }
  static Var add_node(Tape& tape, Tensor value, bool needs_gradient, BackwardStep step);
  static Tape::Node& node(Tape& tape, int32_t index) {
    TQ_CHECK(index >= tape.n_forgotten_, "a Var from before the last backward()");
    return tape.nodes_[static_cast<size_t>(index - tape.n_forgotten_)];
  }
  static Var run_checkpoint(Tape& tape, const CheckpointBody& fn, const std::vector<Var>& inputs);
  static void rerun(Tape& tape, const CheckpointBody& fn, const std::vector<Var>& inputs,
                    Tensor gradient, Gradients& out);
};

/// Memory for a value or a gradient, not initialised.
inline Tensor new_tensor(const Tape& tape, Shape shape) {
  return Tensor(shape, TapeAccess::memory(tape));
}
Tensor zero_tensor(const Tape& tape, Shape shape);
/// `t` itself if no one else uses its memory, else a copy.
Tensor own_tensor(const Tape& tape, Tensor t);

inline Var new_var(Tensor value, std::initializer_list<const Var*> inputs, BackwardStep step) {
  Tape& tape = (*inputs.begin())->tape();
  bool needs_gradient = false;
  for (const Var* input : inputs) {
    TQ_CHECK(&input->tape() == &tape, "operands of different tapes");
    needs_gradient = needs_gradient || input->needs_gradient();
  }
  return TapeAccess::add_node(tape, std::move(value), needs_gradient, std::move(step));
}

/// fn(begin, end) over [0, count) in pieces for each thread. fn must not depend on the cut.
template <typename Function>
void parallel_ranges(const Tape& tape, int64_t count, int64_t floats_each, const Function& fn) {
  // Entering a parallel region takes some microseconds: below this many floats one thread wins.
  constexpr int64_t kFloatsForThreads = 1 << 15;
  const int64_t n_pieces = count * floats_each < kFloatsForThreads
                               ? 1
                               : std::min<int64_t>(count, 4 * int64_t{tape.n_threads()});
  if (n_pieces <= 1 || tape.n_threads() == 1) {
    fn(int64_t{0}, count);
    return;
  }
  parallel_items(tape.n_threads(), n_pieces, [&](int64_t piece, int) {
    fn(count * piece / n_pieces, count * (piece + 1) / n_pieces);
  });
}

/// Sum over i < count of term(i), f64, in an order that does not depend on the threads.
template <typename Function>
double ordered_sum(const Tape& tape, int64_t count, int64_t floats_each, const Function& term) {
  std::vector<double> terms(static_cast<size_t>(count));
  parallel_ranges(tape, count, floats_each, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) terms[static_cast<size_t>(i)] = term(i);
  });
  double sum = 0;
  for (double value : terms) sum += value;
  return sum;
}

}  // namespace tq
