// learn - the descent over bases. See learn.h; read Learner::run() first.
#include "quant/learn.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "cpu/parallel.h"
#include "model/error.h"
#include "quant/branch.h"
#include "quant/gl.h"
#include "quant/magnitude.h"
#include "quant/objective.h"
#include "quant/rng.h"
#include "quant/stiefel.h"

namespace tq {
namespace {

// Layers of a step and tokens of each: folding a weight into a basis costs as much as multiplying
// `dim` tokens by it, so few layers with some hundred tokens each learn fastest a second.
constexpr int64_t kLayersPerStep = 6, kTokensPerStep = 256;
// Step lengths at the start of the cosine schedule, of Adam per entry of the generator (radians).
constexpr double kResidualRate = 0.004, kHeadRate = 0.01, kLayerwiseRate = 0.002, kGaugeRate = 0.01;
// Of these rates where a loss is that of predictions: the gradient of one sequence is noisy.
constexpr double kPredictionShare = 0.3;
// Streams of random numbers, apart from those of quantize_layer.cpp (0 .. n_layers).
constexpr uint64_t kResidualSigns = 1u << 20, kHeadSigns = 2u << 20, kSchedule = 3u << 20;

MatrixRM random_hadamard(int64_t n, uint64_t seed, uint64_t stream) {
  const Rotation rotation = Rotation::random_hadamard(n, seed, stream);
  MatrixRM m = MatrixRM::Identity(n, n);
  for (int64_t i = 0; i < n; ++i) apply_transform(rotation.transform, m.row(i).data(), false);
  return m;
}

// One orthogonal matrix on its way down.
class Descending {
 public:
  Descending(MatrixRM start, double rate) : matrix(std::move(start)), rate_(rate) {
    StiefelOptions options;
    options.descent.momentum = 0.9;
    options.descent.adam = true;
    options.descent.per_entry = true;
    options.descent.second_momentum = 0.95;
    options.descent.max_step = 4;
    optimizer_ = std::make_unique<StiefelOptimizer>(options);
    publish();
  }
  BasisLeaf leaf() {
    touched_ = true;
    return {&values, gradient.data()};
  }
  bool touched() const { return touched_; }
  void transfer(Archive& archive) {
    archive.matrix(matrix);
    optimizer_->transfer(archive);
    if (archive.reading()) publish();
  }
  void step(double factor) {
    if (!touched_) return;
    MatrixRM d(matrix.rows(), matrix.cols());
    for (int64_t i = 0; i < d.size(); ++i) d.data()[i] = double{gradient[static_cast<size_t>(i)]};
    optimizer_->set_lr(rate_ * factor);
    optimizer_->step(matrix, d);
    publish();
  }

  MatrixRM matrix;
  FloatMatrix values;           // the same in f32, as the tape reads it
  std::vector<float> gradient;  // of values

 private:
  void publish() {
    values = to_float(matrix);
    gradient.assign(values.data.size(), 0.0f);
    touched_ = false;
  }
  double rate_;
  bool touched_ = false;
  std::unique_ptr<StiefelOptimizer> optimizer_;
};

// The branch of one linear and its G.
struct DescendingBranch {
  LowRank factors;  // as moved by G
  std::vector<float> gradient_a, gradient_b;
  std::unique_ptr<MultiplicativeGauge> gauge;

  explicit DescendingBranch(int64_t rank) {
    GaugeOptions options;
    options.descent.momentum = 0.9;
    options.descent.adam = true;
    options.descent.per_entry = true;
    options.descent.second_momentum = 0.95;
    gauge = std::make_unique<MultiplicativeGauge>(MatrixRM::Identity(rank, rank), options);
  }
  void transfer(Archive& archive) {
    for (FloatMatrix* factor : {&factors.a, &factors.b}) {
      archive.value(factor->rows);
      archive.value(factor->cols);
      archive.vector(factor->data);
    }
    gauge->transfer(archive);
    if (archive.reading()) clear();
  }
  void clear() {
    gradient_a.assign(factors.a.data.size(), 0.0f);
    gradient_b.assign(factors.b.data.size(), 0.0f);
  }
  void step(double factor) {
    MatrixRM a = to_double(factors.a), b = to_double(factors.b);
    const MatrixRM g_a = to_double({factors.a.rows, factors.a.cols, gradient_a});
    const MatrixRM g_b = to_double({factors.b.rows, factors.b.cols, gradient_b});
    gauge->set_lr(kGaugeRate * factor);
    gauge->step(gauge_gradient(g_a, a, b, g_b)).apply(a, b);
    factors.a = to_float(a);
    factors.b = to_float(b);
  }
};

class Learner {
 public:
  Learner(const LearnInputs& inputs, const QuantizeOptions& options, const LearnHooks& hooks)
      : inputs_(inputs),
        options_(options),
        hooks_(hooks),
        context_(inputs.model.config, inputs.down),
        n_layers_(inputs.model.config.n_layers),
        rng_(options.seed, kSchedule) {
    const Config& c = inputs.model.config;
    if (options.learns_from_predictions()) {
      head_ = to_float_matrix(inputs.model.lm_head.weight);
      for (int64_t row = 0; row < head_.rows; ++row) {
        for (int64_t i = 0; i < c.dim; ++i) {
          head_.row(row)[i] *= inputs.model.final_norm[static_cast<size_t>(i)];
        }
      }
    }
    residual_.emplace_back(random_hadamard(c.dim, options.seed, kResidualSigns), kResidualRate);
    for (int64_t layer = 0; layer < n_layers_; ++layer) {
      const uint64_t stream = kHeadSigns + static_cast<uint64_t>(layer);
      heads_.emplace_back(random_hadamard(c.head_dim, options.seed, stream), kHeadRate);
    }
  }

  LearnResult run() {
    const bool layerwise = options_.basis == Basis::kLayerwise;
    // Sublayer bases start from a global one: what they have in common is learned by all layers
    // together, and the rotations between them stay small.
    const int64_t shared = layerwise ? options_.steps / 2 : options_.steps;
    const bool restored = hooks_.restore && hooks_.restore([this](Archive& a) { transfer(a); });
    if (!restored && options_.rounds_branch() && options_.split == Split::kSvd) split_weights();
    if (residual_.size() == 1) descend(0, shared);
    if (layerwise) {
      if (residual_.size() == 1) part_sublayers();
      descend(shared, options_.steps);
    }
    LearnResult result;
    for (const Descending& basis : residual_) {
      result.orthogonality_error =
          std::max(result.orthogonality_error, orthogonality_error(basis.matrix));
      result.basis.residual.push_back(nearest_orthogonal(basis.matrix));
    }
    for (const Descending& head : heads_) {
      result.basis.heads.push_back(nearest_orthogonal(head.matrix));
    }
    for (auto& layer : branches_) {
      result.basis.branches.emplace_back();
      for (size_t i = 0; i < layer.size(); ++i) {
        result.basis.branches.back()[i] = std::move(layer[i].factors);
      }
    }
    result.losses = std::move(losses_);
    return result;
  }

 private:
  // Everything that the steps to come depend on, between two steps.
  void transfer(Archive& archive) {
    archive.vector(losses_);
    archive.vector(order_);
    archive.value(rng_.state());
    uint64_t n_bases = residual_.size(), n_branches = branches_.size();
    archive.value(n_bases);
    archive.value(n_branches);
    if (archive.reading()) {
      if (n_bases > 1) part_sublayers();
      TQ_CHECK(n_bases == residual_.size(), "a state of another model");
      while (branches_.size() < n_branches) add_branches();
    }
    for (Descending& basis : residual_) basis.transfer(archive);
    for (Descending& head : heads_) head.transfer(archive);
    for (auto& layer : branches_) {
      for (DescendingBranch& branch : layer) branch.transfer(archive);
    }
  }

  // From one basis to one for every sublayer.
  void part_sublayers() {
    const MatrixRM start = residual_.front().matrix;
    residual_.clear();
    for (int64_t i = 0; i <= 2 * n_layers_; ++i) residual_.emplace_back(start, kLayerwiseRate);
  }

  void add_branches() {
    auto& layer = branches_.emplace_back();
    for (int i = 0; i < kNLinears; ++i) layer.emplace_back(options_.rank);
  }

  // The leading singular triplets of every weight, with the closed-form G between the factors.
  void split_weights() {
    for (int64_t index = 0; index < n_layers_; ++index) {
      hooks_.stop();
      const FloatLayer layer = load(index);
      add_branches();
      for (size_t i = 0; i < kNLinears; ++i) {
        DescendingBranch& branch = branches_.back()[i];
        branch.factors = truncated_svd(layer.linears[i], options_.rank);
        const FloatMatrix x = inputs_.bank->gather(index, kSiteOf[i], all_tokens());
        const FloatMatrix h = product_nt(x, branch.factors.a, options_.threads);
        balance_branch(branch.factors,
                       to_double(product_tn(h, h, options_.threads)) / static_cast<double>(h.rows),
                       options_.threads);
        branch.clear();
      }
    }
  }

  std::vector<int64_t> all_tokens() const {
    std::vector<int64_t> tokens(static_cast<size_t>(inputs_.bank->n_tokens()));
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int64_t>(i);
    return tokens;
  }

  FloatLayer load(int64_t index) const {
    FloatLayer layer = load_float_layer(inputs_.model, index, options_.threads);
    if (hooks_.loaded) hooks_.loaded(index);
    fold_norm_gains(layer, options_.threads);
    take_out_powers(layer, options_.threads);
    transform_rows(layer.linears[kWDown], inputs_.down, 1, options_.threads);
    return layer;
  }

  LayerBases bases(int64_t index) {
    const bool shared = residual_.size() == 1;
    const size_t at = shared ? 0 : static_cast<size_t>(2 * index);
    return {residual_[at].leaf(), residual_[shared ? 0 : at + 1].leaf(),
            residual_[shared ? 0 : at + 2].leaf(), heads_[static_cast<size_t>(index)].leaf()};
  }

  // Every layer once before any comes again, in random order.
  int64_t next_layer() {
    if (order_.empty()) {
      for (int64_t i = 0; i < n_layers_; ++i) order_.push_back(i);
      for (size_t i = order_.size() - 1; i > 0; --i) {
        std::swap(order_[i], order_[static_cast<size_t>(rng_.next() % (i + 1))]);
      }
    }
    const int64_t layer = order_.back();
    order_.pop_back();
    return layer;
  }

  void descend(int64_t first, int64_t last) {
    const double scale = options_.learns_from_predictions() ? kPredictionShare : 1.0;
    const Transfer state = [this](Archive& archive) { transfer(archive); };
    for (int64_t step = std::max(first, std::ssize(losses_)); step < last; ++step) {
      std::vector<int64_t> visited;
      const SplitMix64 rng = rng_;
      const std::vector<int64_t> order = order_;
      double loss = 0;
      try {
        loss = visit_layers(visited);
      } catch (const Error& error) {
        if (error.kind() != ErrorKind::kInterrupted || !hooks_.keep) throw;
        rng_ = rng;  // the step begins again
        order_ = order;
        hooks_.keep(state, true);
        throw;
      }
      const double progress = static_cast<double>(step - first) / static_cast<double>(last - first);
      const double factor = scale * 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
      move(visited, factor);
      losses_.push_back(loss);
      const size_t window = std::min<size_t>(losses_.size(), 10);
      double recent = 0;
      for (size_t i = losses_.size() - window; i < losses_.size(); ++i) recent += losses_[i];
      hooks_.progress(step + 1, options_.steps, recent / static_cast<double>(window));
      if (hooks_.keep) hooks_.keep(state, false);
    }
  }

  // Gradients of a step, and its loss.
  double visit_layers(std::vector<int64_t>& visited) {
    if (options_.learns_from_predictions()) {
      hooks_.stop();
      return predict();
    }
    double loss = 0;
    const int64_t n_visits = std::min(kLayersPerStep, n_layers_);
    for (int64_t i = 0; i < n_visits; ++i) {
      hooks_.stop();
      visited.push_back(next_layer());
      loss += visit(visited.back()) / static_cast<double>(n_visits);
    }
    return loss;
  }

  double visit(int64_t index) {
    const bool block = options_.loss == LearningLoss::kBlock;
    const std::vector<int64_t> tokens = block ? neighbouring_tokens() : random_tokens();
    FloatLayer layer = load(index);
    std::array<FloatMatrix, kNLinears> originals;
    LayerProblem problem;
    problem.layer = &layer;
    for (size_t site = 0; site < 4; ++site) {
      problem.inputs[site] = inputs_.bank->gather(index, static_cast<Site>(site), tokens);
    }
    problem.bases = bases(index);
    if (block) return block_loss(problem, context_, options_);
    if (!branches_.empty()) {
      for (size_t i = 0; i < kNLinears; ++i) {
        DescendingBranch& branch = branches_[static_cast<size_t>(index)][i];
        originals[i] = layer.linears[i];
        layer.linears[i] = subtract_product(originals[i], branch.factors.b, branch.factors.a);
        problem.originals[i] = &originals[i];
        problem.branches[i] = {&branch.factors, branch.gradient_a.data(), branch.gradient_b.data()};
      }
    }
    return layer_loss(problem, context_, options_);
  }

  uint64_t random_below(int64_t n) { return rng_.next() % static_cast<uint64_t>(n); }

  std::vector<int64_t> random_tokens() {
    std::vector<int64_t> tokens;
    for (int64_t i = 0; i < kTokensPerStep; ++i) {
      tokens.push_back(static_cast<int64_t>(random_below(inputs_.bank->n_tokens())));
    }
    return tokens;
  }

  // A piece of one sample.
  std::vector<int64_t> neighbouring_tokens() {
    const int64_t length = inputs_.bank->sample_length(), count = std::min(kTokensPerStep, length);
    const int64_t sample =
        static_cast<int64_t>(random_below(inputs_.bank->n_tokens() / length)) * length;
    const int64_t first = sample + static_cast<int64_t>(random_below(length - count + 1));
    std::vector<int64_t> tokens(static_cast<size_t>(count));
    std::iota(tokens.begin(), tokens.end(), first);
    return tokens;
  }

  // The whole model with one sequence.
  double predict() {
    const auto& samples = inputs_.calibration.samples;
    PredictionProblem problem;
    problem.tokens = samples[random_below(std::ssize(samples))];
    problem.tok_embed = &inputs_.model.tok_embed;
    problem.head = &head_;
    problem.n_layers = n_layers_;
    problem.layer = [this](int64_t index) -> const FloatLayer& {
      if (index != loaded_index_) loaded_ = load(index);
      loaded_index_ = index;
      return loaded_;
    };
    for (int64_t index = 0; index < n_layers_; ++index) problem.bases.push_back(bases(index));
    return prediction_loss(problem, context_, options_);
  }

  void move(const std::vector<int64_t>& visited, double factor) {
    std::vector<Descending*> moving;
    for (Descending& basis : residual_) {
      if (basis.touched()) moving.push_back(&basis);
    }
    for (Descending& head : heads_) {
      if (head.touched()) moving.push_back(&head);
    }
    parallel_items(options_.threads, std::ssize(moving),
                   [&](int64_t i, int) { moving[static_cast<size_t>(i)]->step(factor); });
    if (branches_.empty()) return;
    for (int64_t layer : visited) {
      for (DescendingBranch& branch : branches_[static_cast<size_t>(layer)]) {
        branch.step(factor);
        branch.clear();
      }
    }
  }

  const LearnInputs& inputs_;
  const QuantizeOptions& options_;
  const LearnHooks& hooks_;
  const LayerContext context_;
  const int64_t n_layers_;
  FloatMatrix head_;   // for the losses of predictions, with the final norm's gain
  FloatLayer loaded_;  // its last layer
  int64_t loaded_index_ = -1;
  SplitMix64 rng_;
  std::vector<Descending> residual_, heads_;
  std::vector<std::vector<DescendingBranch>> branches_;  // [layer][linear], or none
  std::vector<int64_t> order_;
  std::vector<double> losses_;
};

}  // namespace

InputBank::InputBank(const Model& model, const Calibration& calibration, const Transform& down,
                     Backend& backend, int threads,
                     const std::function<void(int64_t layer)>& progress) {
  Calibration first;
  length_ = static_cast<int64_t>(calibration.samples.front().size());
  const size_t n_samples = static_cast<size_t>((kTokens + length_ - 1) / length_);
  // Spread over the text like the samples themselves.
  const size_t available = calibration.samples.size(), count = std::min(n_samples, available);
  for (size_t i = 0; i < count; ++i) {
    first.samples.push_back(calibration.samples[i * available / count]);
  }
  n_tokens_ = first.n_tokens();
  CalibrationStream stream(model, first, {}, backend, threads);
  for (int64_t index = 0; index < model.config.n_layers; ++index) {
    progress(index);
    FloatLayer layer = load_float_layer(model, index, threads);
    fold_norm_gains(layer, threads);
    take_out_powers(layer, threads);
    transform_rows(layer.linears[kWDown], down, 1, threads);
    layer.down_input = down;
    inputs_.emplace_back();
    stream.run_layer(
        layer.view(),
        [&](Site site, const float* x, int64_t rows, int64_t cols) {
          FloatMatrix& kept = inputs_.back()[static_cast<size_t>(site)];
          kept.cols = cols;
          kept.rows += rows;
          kept.data.insert(kept.data.end(), x, x + rows * cols);
        },
        [] {});
    for (FloatMatrix& kept : inputs_.back()) {
      const int exponent = input_exponent(kept.data);
      if (exponent == 0) continue;
      for (float& value : kept.data) value = std::ldexp(value, -exponent);
    }
  }
}

FloatMatrix InputBank::gather(int64_t layer, Site site, const std::vector<int64_t>& tokens) const {
  const FloatMatrix& kept = inputs_[static_cast<size_t>(layer)][static_cast<size_t>(site)];
  FloatMatrix x{static_cast<int64_t>(tokens.size()), kept.cols, {}};
  x.data.reserve(tokens.size() * static_cast<size_t>(kept.cols));
  for (int64_t token : tokens) {
    x.data.insert(x.data.end(), kept.row(token), kept.row(token) + kept.cols);
  }
  return x;
}

LearnResult learn_basis(const LearnInputs& inputs, const QuantizeOptions& options,
                        const LearnHooks& hooks) {
  return Learner(inputs, options, hooks).run();
}

}  // namespace tq
