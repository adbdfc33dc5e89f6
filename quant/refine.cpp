// refine - the quantized model on the tape. See refine.h; read Student::layer() first.
#include "quant/refine.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <iterator>
#include <numbers>
#include <span>

#include "cpu/autodiff_model.h"
#include "cpu/autodiff_ops.h"
#include "cpu/autodiff_rounding.h"
#include "model/error.h"
#include "quant/rng.h"
#include "quant/rotation.h"
#include "quant/rounded_layer.h"
#include "quant/rounding.h"

namespace tq {
namespace {

constexpr int64_t kSequences = 2;  // a step
// Steps of Adam are relative: a scale moves by at most kRate sqrt(KL) of itself. All scales move at
// once, each by the sign of a noisy gradient, and what that adds to the KL grows with the square of
// the rate: a model that is nearer to its original bears less.
constexpr double kRate = 0.004, kFirstDecay = 0.9, kSecondDecay = 0.95, kWarmUp = 0.25;
// Sequences whose KL decides whether the refined scales are kept.
constexpr int64_t kJudges = 4;
constexpr uint64_t kOrder = 4u << 20;  // stream of random numbers

// The scales of one packed matrix. What Adam moves are their logarithms, or, where they are
// two-level, those of the units: a row's scales move together then, in steps of 7 bits.
struct Scales {
  Scales(OwnedMatrix& matrix, bool two_level)
      : matrix(matrix), two_level(two_level), n_together(two_level ? matrix.view().n_groups() : 1) {
    for (uint16_t bits : matrix.scales) values.push_back(f16_to_f32(bits));
    gradient.resize(values.size());
    const size_t n_moved = values.size() / static_cast<size_t>(n_together);
    first.resize(n_moved);
    second.resize(n_moved);
    if (!two_level) return;
    for (size_t row = 0; row < n_moved; ++row) {
      const auto scales = std::span(values).subspan(row * together(), together());
      units.push_back(common_unit(scales));
      for (float scale : scales) multiples.push_back(scale / units.back());
    }
  }
  Var on(Tape& tape) {
    const Matrix view = matrix.view();
    return scale_codes(
        view, tape.parameter({1, view.rows, view.n_groups()}, values.data(), gradient.data()));
  }
  // The gradient of a logarithm is value * gradient.
  void step(double rate, int64_t t) {
    const double first_bias = 1.0 - std::pow(kFirstDecay, static_cast<double>(t));
    const double second_bias = 1.0 - std::pow(kSecondDecay, static_cast<double>(t));
    for (size_t i = 0; i < first.size(); ++i) {
      double g = 0;
      for (size_t j = i * together(); j < (i + 1) * together(); ++j) {
        g += double{gradient[j]} * double{values[j]};
        gradient[j] = 0;
      }
      first[i] = static_cast<float>(kFirstDecay * double{first[i]} + (1 - kFirstDecay) * g);
      second[i] = static_cast<float>(kSecondDecay * double{second[i]} + (1 - kSecondDecay) * g * g);
      const double length = std::sqrt(double{second[i]} / second_bias) + 1e-12;
      const float factor =
          static_cast<float>(1.0 - rate * (double{first[i]} / first_bias) / length);
      if (!two_level) {
        values[i] *= factor;
        continue;
      }
      units[i] *= factor;
      const float unit = round_unit(units[i]);
      for (size_t j = i * together(); j < (i + 1) * together(); ++j) {
        values[j] = unit * multiples[j];
      }
    }
  }
  void store() {
    for (size_t i = 0; i < values.size(); ++i) matrix.scales[i] = f32_to_f16(values[i]);
  }
  size_t together() const { return static_cast<size_t>(n_together); }

  OwnedMatrix& matrix;
  bool two_level;
  int64_t n_together;  // scales that move as one
  std::vector<float> values, gradient, first, second;
  std::vector<float> units, multiples;  // two-level: of rows, of groups
};

// A stored matrix as an operand: trained scales, or fixed values where it is not packed.
struct Weight {
  Scales* scales = nullptr;
  FloatMatrix fixed;
  Var on(Tape& tape) const {
    if (scales) return scales->on(tape);
    return tape.constant({1, fixed.rows, fixed.cols}, fixed.data.data());
  }
};

struct FloatStep {
  FloatMatrix a, b;
};

std::optional<FloatStep> to_float_step(const std::optional<OwnedLowRankStep>& step) {
  if (!step) return std::nullopt;
  return FloatStep{to_float_matrix(step->a.view()), to_float_matrix(step->b.view())};
}

struct StudentLinear {
  const OwnedLinear* linear = nullptr;
  Weight weight, branch_a, branch_b;
  std::vector<float> factors;  // 2^exponents, [out] or empty
};

class Student {
 public:
  Student(std::vector<OwnedLayer>& layers, const RefineInputs& inputs,
          const QuantizeOptions& options)
      : layers_(layers), inputs_(inputs), config_(inputs.source.config), options_(options) {
    if (inputs.output_basis.kind == Transform::Kind::kDense) {
      last_ = to_float_matrix(inputs.output_basis.matrix);
    } else {
      output_basis_ = FastTransform(inputs.output_basis);
    }
    rope_.inv_freq = rope_inv_freq(config_.rope, config_.head_dim);
    rope_.attention_factor = static_cast<float>(config_.rope.attention_factor);
    head_ = to_float_matrix(inputs.source.lm_head.weight);
    for (OwnedLayer& layer : layers) {
      linears_.emplace_back();
      skips_.emplace_back(to_float_step(layer.attn_skip), to_float_step(layer.ffn_skip));
      for (size_t i = 0; i < kNLinears; ++i) {
        OwnedLinear& linear = layer.linears[i];
        StudentLinear& student = linears_.back()[i];
        student.linear = &linear;
        student.weight = make_weight(linear.weight);
        if (linear.branch_a) student.branch_a = make_weight(*linear.branch_a);
        if (linear.branch_b) student.branch_b = make_weight(*linear.branch_b);
        if (linear.input.active()) down_ = FastTransform(linear.input);
        for (int8_t e : linear.exponents) student.factors.push_back(std::ldexp(1.0f, e));
      }
    }
  }

  // KL over one sequence, nats a token; adds the gradient of KL / kSequences to the scales.
  double learn_from(size_t sample) {
    Tape tape(kernels_for(best_isa()), options_.threads);
    const Var loss = kl_of(tape, sample);
    const double value = loss.item();
    tape.backward(scale(loss, 1.0f / kSequences));
    return value;
  }

  // Mean KL over some sequences; changes nothing.
  double measure(std::span<const size_t> samples) {
    double total = 0;
    for (size_t sample : samples) {
      Tape tape(kernels_for(best_isa()), options_.threads);
      total += kl_of(tape, sample).item() / static_cast<double>(samples.size());
    }
    return total;
  }

  void step(double rate, int64_t t) {
    for (Scales& scales : scales_) scales.step(rate, t);
  }
  void store() {
    for (Scales& scales : scales_) scales.store();
  }

 private:
  Var kl_of(Tape& tape, size_t sample) {
    const std::vector<int32_t>& tokens = inputs_.calibration.samples[sample];
    const int64_t rows = static_cast<int64_t>(tokens.size());
    embedded_ = embed_tokens(inputs_.source.tok_embed, tokens, inputs_.basis, options_.threads);
    const float* reference =
        inputs_.reference.data() + static_cast<int64_t>(sample) * rows * config_.dim;
    Var x = tape.constant({1, rows, config_.dim}, embedded_.data.data());
    for (size_t index = 0; index < layers_.size(); ++index) {
      x = checkpoint(tape,
                     [this, index](Tape& inner, const std::vector<Var>& in) {
                       return layer(inner, index, in[0]);
                     },
                     {x});
    }
    const Var head = tape.constant({1, head_.rows, head_.cols}, head_.data.data());
    const Var target = final_hidden(tape.constant({1, rows, config_.dim}, reference));
    return head_kl(target, head, final_hidden(x), head);
  }

  Weight make_weight(OwnedMatrix& matrix) {
    Weight weight;
    if (matrix.view().packed()) {
      weight.scales = &scales_.emplace_back(matrix, options_.two_level);
    } else {
      weight.fixed = to_float_matrix(matrix.view());
    }
    return weight;
  }

  // The layer of model/forward.cpp, as the runtime computes it for these codes.
  Var layer(Tape& tape, size_t index, const Var& x) {
    const OwnedLayer& norms = layers_[index];
    const auto& linears = linears_[index];
    Var in = gained(rms_norm(x, config_.norm_eps), norms.attn_norm);
    Var rounded = round_input(in, linears[kWq].linear->act);
    Var q = run(tape, linears[kWq], in, rounded), k = run(tape, linears[kWk], in, rounded);
    const Var v = run(tape, linears[kWv], in, rounded);
    if (config_.has_qk_norm()) {
      q = head_norm(q, norms.q_norm);
      k = head_norm(k, norms.k_norm);
    }
    q = rope(q, rope_, config_.n_heads, 1);
    k = rope(k, rope_, config_.n_kv_heads, 1);
    Var mixed = causal_attention(q, k, v, {config_.n_heads, config_.n_kv_heads, 1});
    rounded = round_input(mixed, linears[kWo].linear->act);
    Var stream =
        add(skipped(tape, x, skips_[index].first), run(tape, linears[kWo], mixed, rounded));

    in = gained(rms_norm(stream, config_.norm_eps), norms.ffn_norm);
    rounded = round_input(in, linears[kWGate].linear->act);
    Var hidden =
        silu_mul(run(tape, linears[kWGate], in, rounded), run(tape, linears[kWUp], in, rounded));
    if (linears[kWDown].linear->input.active()) hidden = hadamard(hidden, down_);
    rounded = round_input(hidden, linears[kWDown].linear->act);
    return add(skipped(tape, stream, skips_[index].second),
               run(tape, linears[kWDown], hidden, rounded));
  }

  Var run(Tape& tape, const StudentLinear& student, const Var& x, const Var& rounded) {
    const Var y = sum_of_components(tape, student, x, rounded);
    return student.factors.empty() ? y : gained(y, student.factors);
  }

  static Var sum_of_components(Tape& tape, const StudentLinear& student, const Var& x,
                               const Var& rounded) {
    const OwnedLinear& linear = *student.linear;
    const Var y = matmul_nt(rounded, student.weight.on(tape));
    if (!linear.branch_a) return y;
    // A dense branch reads the input unrounded (docs/format.md).
    const bool packed = linear.branch_a->view().packed();
    Var h = matmul_nt(packed ? rounded : x, student.branch_a.on(tape));
    if (packed) h = round_input(h, linear.act.narrow(h.shape().cols, linear.branch_b->group));
    return add(y, matmul_nt(h, student.branch_b.on(tape)));
  }

  static Var round_input(const Var& x, const ActQuant& act) {
    if (act.bits >= 16) return x;
    return round_groups(x, rounding_of(act));
  }

  static Var gained(const Var& x, const std::vector<float>& gain) {
    const int64_t n = static_cast<int64_t>(gain.size());
    return mul_row(x, x.tape().constant({1, 1, n}, gain.data()));
  }

  Var head_norm(const Var& x, const std::vector<float>& gain) const {
    const Shape heads{1, x.shape().size() / config_.head_dim, config_.head_dim};
    return reshape(gained(rms_norm(reshape(x, heads), config_.norm_eps), gain), x.shape());
  }

  static Var skipped(Tape& tape, const Var& x, const std::optional<FloatStep>& step) {
    if (!step) return x;
    return add(x, matmul_nt(matmul_nt(x, constant(tape, step->a)), constant(tape, step->b)));
  }

  // Out of the basis of the last layer, through the final norm.
  Var final_hidden(const Var& x) const {
    const Transform& basis = inputs_.output_basis;
    const Var own = basis.kind == Transform::Kind::kDense ? matmul_nt(x, constant(x.tape(), last_))
                    : basis.active()                      ? hadamard(x, output_basis_, true)
                                                          : x;
    return gained(rms_norm(own, config_.norm_eps), inputs_.source.final_norm);
  }

  static Var constant(Tape& tape, const FloatMatrix& m) {
    return tape.constant({1, m.rows, m.cols}, m.data.data());
  }

  std::vector<OwnedLayer>& layers_;
  const RefineInputs& inputs_;
  const Config& config_;
  const QuantizeOptions& options_;
  FastTransform output_basis_, down_;  // Hadamard
  FloatMatrix last_;                   // dense output basis
  RopeTable rope_;
  FloatMatrix head_;
  FloatMatrix embedded_;  // of the sequence on the tape
  std::vector<std::pair<std::optional<FloatStep>, std::optional<FloatStep>>> skips_;
  std::deque<Scales> scales_;  // stable addresses
  std::vector<std::array<StudentLinear, kNLinears>> linears_;
};

std::vector<size_t> shuffled(size_t count, uint64_t seed) {
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = i;
  SplitMix64 rng(seed, kOrder);
  for (size_t i = count - 1; i > 0; --i) std::swap(order[i], order[rng.next() % (i + 1)]);
  return order;
}

}  // namespace

RefineResult refine_scales(std::vector<OwnedLayer>& layers, const RefineInputs& inputs,
                           const QuantizeOptions& options, const RefineHooks& hooks) {
  Student student(layers, inputs, options);
  const std::vector<size_t> order = shuffled(inputs.calibration.samples.size(), options.seed);
  // The last sequences of the order judge; steps reach them only when they go round.
  const std::span<const size_t> judges(order.end() - std::min<int64_t>(kJudges, std::ssize(order)),
                                       order.end());
  const double before = student.measure(judges), rate = kRate * std::sqrt(before);
  std::vector<double> losses;
  size_t next = 0;
  for (int64_t step = 0; step < options.refine_steps; ++step) {
    double kl = 0;
    for (int64_t i = 0; i < kSequences; ++i) {
      hooks.stop();
      kl += student.learn_from(order[next++ % order.size()]) / kSequences;
    }
    const double done = static_cast<double>(step) / static_cast<double>(options.refine_steps);
    const double warm = std::min(
        1.0, static_cast<double>(step + 1) / (kWarmUp * static_cast<double>(options.refine_steps)));
    student.step(rate * warm * 0.5 * (1.0 + std::cos(std::numbers::pi * done)), step + 1);
    losses.push_back(kl);
    hooks.progress(step + 1, options.refine_steps, kl);
  }
  const double after = student.measure(judges);
  if (after < before) student.store();
  return {std::move(losses), before, after};
}

}  // namespace tq
