// quantize_layer - folding and rounding of one layer. See quantize_layer.h.
#include "quant/quantize_layer.h"

#include "model/error.h"
#include "quant/branch.h"
#include "quant/decompose.h"
#include "quant/magnitude.h"
#include "quant/rounding.h"

namespace tq {
namespace {

// Streams of random numbers: 0 for the residual basis, layer + 1 for the heads of a layer.
constexpr uint64_t kResidualStream = 0;
// Rounds of fitting the branch to what the residual leaves over, and rounding the residual again.
constexpr int kFitRounds = 2;

Storage unrounded_storage(const QuantizeOptions& options, bool keep, const FloatMatrix& w) {
  return options.bits_w == 32 && !keep ? Storage::kF32 : choose_16_bit(w.data);
}

// Unrounded bases are for tests of exactness: there the stored matrix must not round either.
OwnedMatrix store_basis(const FloatMatrix& m, const QuantizeOptions& options) {
  return store_dense(m.data, m.rows, m.cols,
                     options.bits_w == 32 ? Storage::kF32 : choose_16_bit(m.data));
}

OwnedLowRankStep store_step(const BasisStep& step, const QuantizeOptions& options) {
  return {store_basis(step.a, options), store_basis(step.b, options)};
}

Transform dense_transform(const OwnedMatrix& matrix) {
  Transform transform;
  transform.kind = Transform::Kind::kDense;
  transform.size = matrix.rows;
  transform.matrix = matrix.view();
  return transform;
}

bool rounds(const QuantizeOptions& options, const LinearPlan& plan) {
  return !plan.keep && options.rounding != RoundingKind::kStore;
}

// A folded weight as it is to be stored: to be rounded it may have to lose a power of two in each
// row, to be stored as it is it takes back what it has lost.
struct Powered {
  Powered(const FloatLayer& folded, int linear, bool rounds, const QuantizeOptions& options)
      : original(folded.linears[static_cast<size_t>(linear)]) {
    const std::vector<int8_t>& taken = folded.exponents[static_cast<size_t>(linear)];
    if (!rounds) {
      if (!taken.empty()) change(taken, 1, options.threads);
      return;
    }
    exponents = taken;
    rows = row_exponents(original, {options.bits_w, options.group, options.two_level}, taken,
                         options.threads);
    if (rows.empty()) return;
    change(rows, -1, options.threads);
    exponents.resize(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      exponents[i] = static_cast<int8_t>(exponents[i] + rows[i]);
    }
  }
  const FloatMatrix& w() const { return changed.data.empty() ? original : changed; }

  const FloatMatrix& original;
  FloatMatrix changed;
  std::vector<int8_t> rows;       // lost here, or empty
  std::vector<int8_t> exponents;  // lost in all, or empty

 private:
  void change(const std::vector<int8_t>& by, int sign, int threads) {
    changed = original;
    scale_rows(changed, by, sign, threads);
  }
};

// What rounding a linear may know about its inputs; null without calibration.
struct Inputs {
  const SiteStats* stats = nullptr;
  const GptqFactor* factor = nullptr;
};

// W ~ B A + R, all three rounded: the branch is given or fitted, R takes what it leaves.
int64_t round_with_branch(const FloatMatrix& target, const LowRank* given, const Inputs& inputs,
                          const QuantizeOptions& options, OwnedLinear& out) {
  const RoundingSpec spec{options.bits_w, options.group, options.two_level};
  const BranchSpec branch_spec{options.rank, options.branch_bits, options.group, options.two_level,
                               options.threads};
  const auto round_rest = [&](const FittedBranch& branch) {
    FloatMatrix rest = target;
    subtract(rest, branch.seen);
    return round_matrix(rest, spec, inputs.factor, options.threads);
  };
  FittedBranch branch;
  Rounded rounded;
  if (given) {
    const FloatMatrix product = product_nn(given->b, given->a, options.threads);
    branch = round_branch(*given, product, *inputs.stats, *inputs.factor, branch_spec);
    rounded = round_rest(branch);
  } else {
    rounded = round_matrix(target, spec, inputs.factor, options.threads);
    for (int round = 0; round < kFitRounds; ++round) {
      FloatMatrix error = target;
      subtract(error, to_float_matrix(rounded.matrix.view()));
      branch = fit_branch(error, *inputs.stats, *inputs.factor, branch_spec);
      rounded = round_rest(branch);
    }
  }
  out.branch_a = std::move(branch.a);
  out.branch_b = std::move(branch.b);
  out.weight = std::move(rounded.matrix);
  return rounded.n_clipped;
}

// Stores one weight, corrected already. Returns the number of clipped weights.
int64_t store_linear(const FloatMatrix& target, const LinearPlan& plan,
                     const QuantizeOptions& options, const LowRank* given, const Inputs& inputs,
                     OwnedLinear& out) {
  out.act.bits = plan.keep ? 16 : options.bits_a;
  if (!rounds(options, plan)) {
    out.weight = store_dense(target.data, target.rows, target.cols,
                             unrounded_storage(options, plan.keep, target));
    return 0;
  }
  if (inputs.stats) {
    out.act = inputs.stats->act();
  } else {
    out.act.codes = options.act_codes;
    out.act.two_level = options.two_level;
  }
  if (options.rounds_branch()) return round_with_branch(target, given, inputs, options, out);
  const RoundingSpec spec{options.bits_w, options.group, options.two_level};
  Rounded rounded;
  if (options.rank > 0) {
    Decomposed split =
        decompose(target, options.rank, {options.branch_bits, options.group, options.two_level});
    rounded = round_matrix(split.residual, spec, inputs.factor, options.threads);
    out.branch_a = std::move(split.a);
    out.branch_b = std::move(split.b);
  } else {
    rounded = round_matrix(target, spec, inputs.factor, options.threads);
  }
  out.weight = std::move(rounded.matrix);
  return rounded.n_clipped;
}

// The branch of a linear before rounding, folded; nothing where it is fitted later. rows: the
// powers of two that w has lost since it was folded, or empty.
std::optional<LowRank> given_branch(const FloatMatrix& w, int64_t layer, int linear,
                                    const QuantizeOptions& options, const ModelBasis& basis,
                                    const SiteStats* stats, const std::vector<int8_t>& rows) {
  if (!options.rounds_branch() || options.split == Split::kFit) return std::nullopt;
  if (const LowRank* learned = basis.branch(layer, linear)) {
    LowRank folded = *learned;
    fold_branch(folded, static_cast<LinearIndex>(linear), layer, *basis.learned(), options.threads);
    if (!rows.empty()) scale_rows(folded.b, rows, -1, options.threads);
    return folded;
  }
  LowRank factors = truncated_svd(w, options.rank);
  const FloatMatrix h = product_nt(stats->rounded(), factors.a, options.threads);
  balance_branch(factors,
                 to_double(product_tn(h, h, options.threads)) / static_cast<double>(h.rows),
                 options.threads);
  return factors;
}

}  // namespace

ModelBasis::ModelBasis(const QuantizeOptions& options, const Config& config) {
  if (options.basis == Basis::kNone) return;
  down_ = Rotation::plain_hadamard(config.hidden_dim);
  if (options.basis != Basis::kHadamard) return;
  residual_ = Rotation::random_hadamard(config.dim, options.seed, kResidualStream);
}

void ModelBasis::deploy(LearnedBasis learned, const QuantizeOptions& options) {
  deployed_.emplace(learned, options.basis_rank);
  first_ = store_basis(deployed_->residual.front(), options);
  last_ = store_basis(deployed_->residual.back(), options);
  branches_ = std::move(learned.branches);
}

Transform ModelBasis::input() const {
  return deployed_ ? dense_transform(first_) : residual_.transform;
}

Transform ModelBasis::output() const {
  return deployed_ ? dense_transform(last_) : residual_.transform;
}

const LowRank* ModelBasis::branch(int64_t layer, int linear) const {
  if (branches_.empty()) return nullptr;
  return &branches_[static_cast<size_t>(layer)][static_cast<size_t>(linear)];
}

std::string ModelBasis::fallback_note(const Config& config) const {
  std::string note;
  const auto check = [&](const char* name, int64_t size) {
    const int64_t block = Rotation::plain_hadamard(size).transform.block;
    if (block == size) return;
    note += (note.empty() ? "" : "; ") + std::string("no Hadamard matrix of order ") +
            std::to_string(size) + " (" + name + "): blocks of " + std::to_string(block);
  };
  if (!down_.transform.active()) return note;
  check("hidden_size", config.dim);
  check("intermediate_size", config.hidden_dim);
  check("head_dim", config.head_dim);
  return note;
}

FloatLayer fold_layer(const Model& model, int64_t index, const QuantizeOptions& options,
                      const ModelBasis& basis) {
  FloatLayer layer = load_float_layer(model, index, options.threads);
  if (options.basis == Basis::kNone) {
    take_out_powers(layer, options.threads);
    return layer;
  }
  fold_norm_gains(layer, options.threads);
  take_out_powers(layer, options.threads);
  // A w_down kept at 16 bits needs no online transform: nothing is rounded there.
  const bool keep_down = plan_layer(options, model.config, index)[kWDown].keep;
  const Transform down = keep_down ? Transform{} : basis.down();
  if (const DeployedBasis* learned = basis.learned()) {
    transform_rows(layer.linears[kWDown], down, 1, options.threads);
    layer.down_input = down;
    fold_into_basis(layer, index, *learned, options.threads);
    if (learned->layerwise() && options.basis_rank > 0) {
      const size_t step = static_cast<size_t>(2 * index);
      layer.attn_skip = store_step(learned->steps[step], options);
      layer.ffn_skip = store_step(learned->steps[step + 1], options);
    }
    return layer;
  }
  const Rotation heads = Rotation::random_hadamard(model.config.head_dim, options.seed,
                                                   static_cast<uint64_t>(index) + 1);
  rotate_layer(layer, model.config, basis.input(), heads.transform, down, options.threads);
  return layer;
}

QuantizedLayer quantize_layer(const FloatLayer& folded, int64_t index,
                              const QuantizeOptions& options, const Config& config,
                              const ModelBasis& basis, LayerStats* stats,
                              const std::function<void()>& stop) {
  const std::vector<LinearPlan> plan = plan_layer(options, config, index);
  QuantizedLayer result;
  result.layer.attn_norm = folded.attn_norm;
  result.layer.ffn_norm = folded.ffn_norm;
  result.layer.q_norm = folded.q_norm;
  result.layer.k_norm = folded.k_norm;
  result.layer.attn_skip = folded.attn_skip;
  result.layer.ffn_skip = folded.ffn_skip;
  GptqFactor factor;
  for (int i = 0; i < kNLinears; ++i) {
    stop();
    const LinearPlan& linear = plan[static_cast<size_t>(i)];
    const SiteStats* site = stats ? &stats->at(kSiteOf[i]) : nullptr;
    const bool uses_factor = options.uses_gptq() && !linear.keep;
    // Linears of one site follow each other, so one factor is in memory at a time.
    const bool same_site = i > 0 && kSiteOf[i] == kSiteOf[i - 1];
    if (uses_factor && !same_site) {
      TQ_CHECK(site);
      factor = factorize(
          site->gram(), options.threads, linear.name.c_str(),
          options.act_order ? activation_order(site->gram(), options.group) : ColumnOrder{});
    }
    OwnedLinear& out = result.layer.linears[static_cast<size_t>(i)];
    const Powered powered(folded, i, rounds(options, linear), options);
    const FloatMatrix& w = powered.w();
    out.exponents = powered.exponents;
    out.act.group = input_group(options, config, kSiteOf[i]);
    const std::optional<LowRank> given =
        linear.keep ? std::nullopt : given_branch(w, index, i, options, basis, site, powered.rows);
    FloatMatrix corrected;
    if (uses_factor && options.rounding == RoundingKind::kGptqCorrected && options.bits_a < 16) {
      corrected = correct_weights(w, *site, factor, options.threads);
    }
    const FloatMatrix& target = corrected.data.empty() ? w : corrected;
    const int64_t n_clipped = store_linear(target, linear, options, given ? &*given : nullptr,
                                           {site, uses_factor ? &factor : nullptr}, out);
    if (i == kWDown) out.input = folded.down_input;
    result.reports.push_back(measure_linear(linear.name, target, out, n_clipped,
                                            site ? &site->gram() : nullptr, options.threads));
  }
  return result;
}

}  // namespace tq
