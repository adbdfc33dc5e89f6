// autodiff - memory, leaves, the backward pass and checkpoints. See autodiff.h.
//
// Measured  one layer of SmolLM2-135M in a learned basis, weights and inputs rounded to 4 bits,
// 2048
//           tokens, one Zen 4 core (116 GFLOP/s of fma): forward 0.29 s, backward 0.48 s of CPU
//           time, three quarters of it in gemm.h; 68 and 83 GFLOP/s over all; 150 MB. 2026-11
#include "cpu/autodiff.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/autodiff_node.h"

namespace tq {
namespace {

constexpr size_t kAlignment = 64;  // an AVX-512 register, a cache line

void add_into(const Tape& tape, const float* from, float* to, int64_t count) {
  parallel_ranges(tape, count, 1, [&](int64_t begin, int64_t end) {
    tape.kernels().add(to + begin, from + begin, end - begin);
  });
}

}  // namespace

Tensor::Tensor(Shape shape, const std::shared_ptr<TapeMemory>& memory) : shape_(shape) {
  TQ_CHECK(shape.batch > 0 && shape.rows > 0 && shape.cols > 0);
  const int64_t bytes = shape.size() * static_cast<int64_t>(sizeof(float));
  const size_t padded = (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment;
  float* data = static_cast<float*>(std::aligned_alloc(kAlignment, padded));
  if (!data) {
    throw Error(ErrorKind::kResource, "not enough memory to learn", "a tensor of the tape",
                std::to_string(bytes) + " bytes", "use fewer calibration tokens at a time");
  }
  memory->bytes += bytes;
  memory->peak_bytes = std::max(memory->peak_bytes, memory->bytes);
  owned_ = std::shared_ptr<float>(data, [memory, bytes](float* p) {
    memory->bytes -= bytes;
    std::free(p);
  });
  data_ = data;
}

Tensor Tensor::reshaped(Shape shape) const {
  TQ_CHECK(shape.size() == size());
  Tensor result = *this;
  result.shape_ = shape;
  return result;
}

Tensor zero_tensor(const Tape& tape, Shape shape) {
  Tensor t = new_tensor(tape, shape);
  std::memset(t.own(), 0, static_cast<size_t>(t.size()) * sizeof(float));
  return t;
}

Tensor own_tensor(const Tape& tape, Tensor t) {
  if (t.sole_owner()) return t;
  Tensor copy = new_tensor(tape, t.shape());
  std::memcpy(copy.own(), t.data(), static_cast<size_t>(t.size()) * sizeof(float));
  return copy;
}

float Var::item() const {
  TQ_CHECK(value_.size() == 1);
  return *value_.data();
}

Tape::Tape(const Kernels& kernels, int n_threads)
    : kernels_(kernels), n_threads_(n_threads), memory_(std::make_shared<TapeMemory>()) {
  TQ_CHECK(n_threads > 0);
}

Tape::Tape(const Tape& outer, bool recording)
    : kernels_(outer.kernels_),
      n_threads_(outer.n_threads_),
      recording_(recording),
      memory_(outer.memory_) {}

Tape::~Tape() = default;

Var Tape::constant(Shape shape, const float* data) {
  return Var(*this, Tensor(shape, data), kNoNode);
}

Var Tape::parameter(Shape shape, const float* data, float* gradient) {
  has_parameters_ = true;
  Var var = TapeAccess::add_node(*this, Tensor(shape, data), true, nullptr);
  if (var.needs_gradient()) TapeAccess::node(*this, var.node()).parameter_gradient = gradient;
  return var;
}

void Tape::backward(const Var& loss) {
  TQ_CHECK(loss.shape() == Shape{}, "backward() starts from one number");
  Tensor one = new_tensor(*this, {});
  *one.own() = 1.0f;
  backward(loss, std::move(one));
}

void Tape::backward(const Var& output, Tensor gradient) {
  TQ_CHECK(&output.tape() == this && output.shape() == gradient.shape());
  if (output.needs_gradient()) run_backward(output.node(), std::move(gradient));
  n_forgotten_ += static_cast<int32_t>(nodes_.size());
  nodes_.clear();
}

void Tape::run_backward(int32_t output, Tensor gradient) {
  Gradients out(*this);
  out.add(output, std::move(gradient));
  for (int32_t index = output; index >= n_forgotten_; --index) {
    Node& node = TapeAccess::node(*this, index);
    // Taken out of the node: what the step captured is free as soon as it has run.
    const BackwardStep step = std::exchange(node.step, nullptr);
    if (step && node.gradient.exists()) step(std::exchange(node.gradient, {}), out);
  }
}

void Gradients::add(int32_t index, Tensor gradient) {
  Tape::Node& node = TapeAccess::node(tape_, index);
  TQ_CHECK(node.shape.size() == gradient.size());
  if (node.parameter_gradient) {
    add_into(tape_, gradient.data(), node.parameter_gradient, gradient.size());
  } else if (node.gradient.exists()) {
    add_into(tape_, gradient.data(), node.gradient.own(), gradient.size());
  } else {
    node.gradient = own_tensor(tape_, std::move(gradient)).reshaped(node.shape);
  }
}

GradientTarget Gradients::target(int32_t index) {
  Tape::Node& node = TapeAccess::node(tape_, index);
  if (node.parameter_gradient) return {node.parameter_gradient, true};
  if (node.gradient.exists()) return {node.gradient.own(), true};
  node.gradient = new_tensor(tape_, node.shape);
  return {node.gradient.own(), false};
}

float* Gradients::sum(int32_t index) {
  const GradientTarget to = target(index);
  if (!to.accumulate) {
    const int64_t size = TapeAccess::node(tape_, index).shape.size();
    std::memset(to.data, 0, static_cast<size_t>(size) * sizeof(float));
  }
  return to.data;
}

Var TapeAccess::add_node(Tape& tape, Tensor value, bool needs_gradient, BackwardStep step) {
  if (!needs_gradient || !tape.recording_) return Var(tape, std::move(value), kNoNode);
  const int32_t index = tape.n_forgotten_ + static_cast<int32_t>(tape.nodes_.size());
  tape.nodes_.push_back({value.shape(), std::move(step), nullptr, {}});
  return Var(tape, std::move(value), index);
}

Var TapeAccess::run_checkpoint(Tape& tape, const CheckpointBody& fn,
                               const std::vector<Var>& inputs) {
  Tape inner(tape, false);
  bool needs_gradient = false;
  std::vector<Var> constants;
  for (const Var& input : inputs) {
    TQ_CHECK(&input.tape() == &tape, "input of another tape");
    needs_gradient = needs_gradient || input.needs_gradient();
    constants.emplace_back(inner, input.value(), kNoNode);
  }
  Tensor value = fn(inner, constants).value();
  tape.has_parameters_ = tape.has_parameters_ || inner.has_parameters_;
  return add_node(tape, std::move(value), needs_gradient || inner.has_parameters_,
                  [fn, inputs](Tensor gradient, Gradients& out) {
                    rerun(out.tape(), fn, inputs, std::move(gradient), out);
                  });
}

void TapeAccess::rerun(Tape& tape, const CheckpointBody& fn, const std::vector<Var>& inputs,
                       Tensor gradient, Gradients& out) {
  Tape inner(tape, true);
  std::vector<Var> leaves;
  for (const Var& input : inputs) {
    Var leaf = add_node(inner, input.value(), input.needs_gradient(), nullptr);
    if (leaf.needs_gradient()) {
      node(inner, leaf.node()).parameter_gradient = out.sum(input.node());
    }
    leaves.push_back(std::move(leaf));
  }
  const int32_t output = fn(inner, leaves).node();
  leaves.clear();
  if (output != kNoNode) inner.run_backward(output, std::move(gradient));
}

Var checkpoint(Tape& tape, const CheckpointBody& fn, const std::vector<Var>& inputs) {
  return TapeAccess::run_checkpoint(tape, fn, inputs);
}

Var detach(const Var& x) {
  return Var(x.tape(), x.value(), kNoNode);
}

}  // namespace tq
