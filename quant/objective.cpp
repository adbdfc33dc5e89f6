// objective - the losses on a tape. See objective.h.
#include "quant/objective.h"

#include "cpu/autodiff_model.h"
#include "cpu/autodiff_ops.h"

namespace tq {
namespace {

class LayerLoss {
 public:
  LayerLoss(const LayerProblem& problem, const LayerContext& context,
            const QuantizeOptions& options)
      : problem_(problem),
        tape_(kernels_for(best_isa()), options.threads),
        original_(tape_, *problem.layer, nullptr, context, options),
        rounded_(tape_, *problem.layer, &problem.bases, context, options) {}

  double of_linears() {
    Var x = input(Site::kAttnIn), rounded = rounded_.input(Site::kAttnIn, x);
    for (LinearIndex index : {kWq, kWk, kWv}) add_linear(index, x, rounded);
    x = input(Site::kAttnOut);
    add_linear(kWo, x, rounded_.input(Site::kAttnOut, x));
    x = input(Site::kFfnIn);
    rounded = rounded_.input(Site::kFfnIn, x);
    for (LinearIndex index : {kWGate, kWUp}) add_linear(index, x, rounded);
    x = input(Site::kFfnMid);
    add_linear(kWDown, x, rounded_.input(Site::kFfnMid, x));
    return finish(kNLinears);
  }

  double of_blocks() {
    const Var attn_in = input(Site::kAttnIn), ffn_in = input(Site::kFfnIn);
    add_error(rounded_.attention(attn_in, 1), original_.attention(attn_in, 1));
    add_error(rounded_.ffn(ffn_in), original_.ffn(ffn_in));
    return finish(2);
  }

 private:
  Var constant(const FloatMatrix& m) { return tape_.constant({1, m.rows, m.cols}, m.data.data()); }
  Var input(Site site) { return constant(problem_.inputs[static_cast<size_t>(site)]); }

  void add_linear(LinearIndex index, const Var& x, const Var& rounded) {
    const size_t i = static_cast<size_t>(index);
    const FloatMatrix* original = problem_.originals[i];
    const Var target = original ? matmul_nt(x, constant(*original)) : original_.output(index, x);
    add_error(rounded_.output(index, rounded, problem_.branches[i]), target);
  }
  void add_error(const Var& y, const Var& target) {
    const Var error = relative_error(y, target);
    total_ = total_.value().exists() ? add(total_, error) : error;
  }
  double finish(int n_terms) {
    const Var loss = scale(total_, 1.0f / static_cast<float>(n_terms));
    const double value = loss.item();
    tape_.backward(loss);
    return value;
  }

  const LayerProblem& problem_;
  Tape tape_;
  RoundedLayer original_, rounded_;
  Var total_;
};

}  // namespace

double layer_loss(const LayerProblem& problem, const LayerContext& context,
                  const QuantizeOptions& options) {
  return LayerLoss(problem, context, options).of_linears();
}

double block_loss(const LayerProblem& problem, const LayerContext& context,
                  const QuantizeOptions& options) {
  return LayerLoss(problem, context, options).of_blocks();
}

double prediction_loss(const PredictionProblem& problem, const LayerContext& context,
                       const QuantizeOptions& options) {
  const Config& c = context.config;
  const bool cross_entropy = options.loss == LearningLoss::kCrossEntropy;
  const int64_t rows = std::ssize(problem.tokens) - (cross_entropy ? 1 : 0);
  std::vector<float> embedded(static_cast<size_t>(rows * c.dim));
  for (int64_t i = 0; i < rows; ++i) {
    matrix_row_f32(*problem.tok_embed, problem.tokens[static_cast<size_t>(i)],
                   embedded.data() + i * c.dim);
  }
  Tape tape(kernels_for(best_isa()), options.threads);
  const auto run = [&](Tape& on, int64_t index, const LayerBases* bases, const Var& x) {
    const RoundedLayer layer(on, problem.layer(index), bases, context, options);
    const Var mid = add(x, layer.attention(rms_norm(x, c.norm_eps), 1));
    return add(mid, layer.ffn(rms_norm(mid, c.norm_eps)));
  };
  Var x = tape.constant({1, rows, c.dim}, embedded.data()), target = x;
  for (int64_t index = 0; index < problem.n_layers; ++index) {
    if (!cross_entropy) target = run(tape, index, nullptr, target);
    x = checkpoint(tape,
                   [&, index](Tape& inner, const std::vector<Var>& inputs) {
                     return run(inner, index, &problem.bases[static_cast<size_t>(index)],
                                inputs[0]);
                   },
                   {x});
  }
  const Var head =
      tape.constant({1, problem.head->rows, problem.head->cols}, problem.head->data.data());
  const Var hidden = rms_norm(x, c.norm_eps);
  const Var loss = cross_entropy ? head_cross_entropy(hidden, head, problem.tokens.subspan(1))
                                 : head_kl(rms_norm(target, c.norm_eps), head, hidden, head);
  const double value = loss.item();
  tape.backward(loss);
  return value;
}

}  // namespace tq
