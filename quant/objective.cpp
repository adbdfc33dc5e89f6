// objective - one layer on a tape. See objective.h.
#include "quant/objective.h"

#include <algorithm>

#include "cpu/autodiff_ops.h"
#include "cpu/autodiff_rounding.h"

namespace tq {
namespace {

// Weights are rounded to nearest while the basis is learned, with a clip near what the search of
// round_matrix() finds for Gaussian groups. GPTQ comes later; learning without any rounding of the
// weights ends in a worse basis (docs/results.md).
constexpr float kWeightClip = 0.95f;

class Objective {
 public:
  Objective(const LayerProblem& problem, const QuantizeOptions& options)
      : problem_(problem),
        tape_(kernels_for(best_isa()), options.threads),
        weight_rounding_{std::min(options.bits_w, 8), options.group, false, kWeightClip},
        input_rounding_{options.bits_a, options.group_a, options.full_range, 1.0f},
        rounds_input_(options.bits_a < 16) {}

  double run() {
    const Var in = leaf(problem_.in), mid = leaf(problem_.mid), out = leaf(problem_.out);
    const Var heads = leaf(problem_.heads);
    const auto same = [](const Var& y) { return y; };

    Var x = input(Site::kAttnIn);
    Var rounded = round_input(matmul_nn(x, in));
    const auto read_in = [&](const Var& w) { return matmul_nn(w, in); };
    add_linear(kWq, x, rounded, read_in, same, same);
    add_linear(kWk, x, rounded, read_in, same, same);
    add_linear(
        kWv, x, rounded, read_in, [&](const Var& w) { return fold_left(w, heads); },
        [&](const Var& y) { return unrotate_heads(y, heads); });

    x = input(Site::kAttnOut);
    rounded = round_input(fold_right(x, heads));
    add_linear(
        kWo, x, rounded, [&](const Var& w) { return fold_right(w, heads); },
        [&](const Var& w) { return fold_left(w, mid); },
        [&](const Var& y) { return matmul_nt(y, mid); });

    x = input(Site::kFfnIn);
    rounded = round_input(matmul_nn(x, mid));
    const auto read_mid = [&](const Var& w) { return matmul_nn(w, mid); };
    add_linear(kWGate, x, rounded, read_mid, same, same);
    add_linear(kWUp, x, rounded, read_mid, same, same);

    x = input(Site::kFfnMid);
    rounded = round_input(x);
    add_linear(
        kWDown, x, rounded, same, [&](const Var& w) { return fold_left(w, out); },
        [&](const Var& y) { return matmul_nt(y, out); });

    const Var loss = scale(total_, 1.0f / static_cast<float>(kNLinears));
    const double value = loss.item();
    tape_.backward(loss);
    return value;
  }

 private:
  Var constant(const FloatMatrix& m) { return tape_.constant({1, m.rows, m.cols}, m.data.data()); }
  Var leaf(const BasisLeaf& basis) {
    const FloatMatrix& m = *basis.matrix;
    return tape_.parameter({1, m.rows, m.cols}, m.data.data(), basis.gradient);
  }
  Var input(Site site) { return constant(problem_.inputs[static_cast<size_t>(site)]); }
  Var round_input(const Var& x) { return rounds_input_ ? round_groups(x, input_rounding_) : x; }
  Var round_weight(const Var& w) { return round_groups(w, weight_rounding_); }

  static Var unrotate_heads(const Var& y, const Var& heads) {
    const int64_t head_dim = heads.shape().cols;
    const Var rows = reshape(y, {1, y.shape().size() / head_dim, head_dim});
    return reshape(matmul_nt(rows, heads), y.shape());
  }

  // read: folds what reads x into a weight's columns; write: what its output is rotated by into its
  // rows; back: undoes that on the outputs. Were the outputs of the original rotated by a constant
  // instead, a basis would seem to lower the loss by turning y' towards them, and learn worse.
  template <typename Read, typename Write, typename Back>
  void add_linear(LinearIndex index, const Var& x, const Var& rounded, const Read& read,
                  const Write& write, const Back& back) {
    const size_t i = static_cast<size_t>(index);
    const FloatMatrix& weight = problem_.layer->linears[i];
    const BranchLeaf& branch = problem_.branches[i];
    const Var w = constant(weight);
    const Var original = branch.factors ? constant(*problem_.originals[i]) : w;
    const Var target = matmul_nt(x, original);
    Var y = matmul_nt(rounded, round_weight(write(read(w))));
    if (branch.factors) {
      const FloatMatrix &a = branch.factors->a, &b = branch.factors->b;
      const Var down = tape_.parameter({1, a.rows, a.cols}, a.data.data(), branch.gradient_a);
      const Var up = tape_.parameter({1, b.rows, b.cols}, b.data.data(), branch.gradient_b);
      const Var h = matmul_nt(rounded, round_weight(read(down)));
      y = add(y, matmul_nt(round_input(h), round_weight(write(up))));
    }
    const Var error = relative_error(back(y), target);
    total_ = total_.value().exists() ? add(total_, error) : error;
  }

  const LayerProblem& problem_;
  Tape tape_;
  GroupRounding weight_rounding_, input_rounding_;
  bool rounds_input_;
  Var total_;
};

}  // namespace

double layer_loss(const LayerProblem& problem, const QuantizeOptions& options) {
  return Objective(problem, options).run();
}

}  // namespace tq
