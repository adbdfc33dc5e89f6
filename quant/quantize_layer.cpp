// quantize_layer - folding and rounding of one layer. See quantize_layer.h.
#include "quant/quantize_layer.h"

#include "model/error.h"
#include "quant/decompose.h"
#include "quant/rounding.h"

namespace tq {
namespace {

constexpr Site kSiteOf[kNLinears] = {Site::kAttnIn, Site::kAttnIn, Site::kAttnIn, Site::kAttnOut,
                                     Site::kFfnIn,  Site::kFfnIn,  Site::kFfnMid};

// Streams of random numbers: 0 for the residual basis, layer + 1 for the heads of a layer.
constexpr uint64_t kResidualStream = 0;

Storage unrounded_storage(const QuantizeOptions& options, bool keep, const FloatMatrix& w) {
  return options.bits_w == 32 && !keep ? Storage::kF32 : choose_16_bit(w.data);
}

// Stores one weight. Returns the number of clipped weights.
int64_t store_linear(const FloatMatrix& w, const LinearPlan& plan, const QuantizeOptions& options,
                     const GptqFactor* factor, OwnedLinear& out) {
  if (plan.keep || options.rounding == RoundingKind::kStore) {
    out.weight = store_dense(w.data, w.rows, w.cols, unrounded_storage(options, plan.keep, w));
    out.act.bits = plan.keep ? 16 : options.bits_a;
    out.act.group = options.group;
    return 0;
  }
  out.act.bits = options.bits_a;
  out.act.group = options.group;
  const RoundingSpec spec{options.bits_w, options.group};
  Rounded rounded;
  if (options.rank > 0) {
    Decomposed split = decompose(w, options.rank, options.branch_bits, options.group);
    rounded = round_matrix(split.residual, spec, factor, options.threads);
    out.branch_a = std::move(split.a);
    out.branch_b = std::move(split.b);
  } else {
    rounded = round_matrix(w, spec, factor, options.threads);
  }
  out.weight = std::move(rounded.matrix);
  return rounded.n_clipped;
}

}  // namespace

ModelBasis::ModelBasis(const QuantizeOptions& options, const Config& config) {
  if (options.basis != Basis::kHadamard) return;
  residual = Rotation::random_hadamard(config.dim, options.seed, kResidualStream);
  down = Rotation::plain_hadamard(config.hidden_dim);
}

std::string ModelBasis::fallback_note(const Config& config) const {
  std::string note;
  const auto check = [&](const char* name, int64_t size) {
    const int64_t block = Rotation::plain_hadamard(size).transform.block;
    if (block == size) return;
    note += (note.empty() ? "" : "; ") + std::string("no Hadamard matrix of order ") +
            std::to_string(size) + " (" + name + "): blocks of " + std::to_string(block);
  };
  if (!residual.transform.active()) return note;
  check("hidden_size", config.dim);
  check("intermediate_size", config.hidden_dim);
  check("head_dim", config.head_dim);
  return note;
}

FloatLayer fold_layer(const Model& model, int64_t index, const QuantizeOptions& options,
                      const ModelBasis& basis) {
  FloatLayer layer = load_float_layer(model, index, options.threads);
  if (!basis.residual.transform.active()) return layer;
  fold_norm_gains(layer, options.threads);
  const Rotation heads = Rotation::random_hadamard(model.config.head_dim, options.seed,
                                                   static_cast<uint64_t>(index) + 1);
  // A w_down kept at 16 bits needs no online transform: nothing is rounded there.
  const bool keep_down = plan_layer(options, model.config, index)[kWDown].keep;
  rotate_layer(layer, model.config, basis.residual.transform, heads.transform,
               keep_down ? Transform{} : basis.down.transform, options.threads);
  return layer;
}

QuantizedLayer quantize_layer(const FloatLayer& folded, int64_t index,
                              const QuantizeOptions& options, const Config& config,
                              LayerGrams* grams, const std::function<void()>& stop) {
  const std::vector<LinearPlan> plan = plan_layer(options, config, index);
  QuantizedLayer result;
  result.layer.attn_norm = folded.attn_norm;
  result.layer.ffn_norm = folded.ffn_norm;
  result.layer.q_norm = folded.q_norm;
  result.layer.k_norm = folded.k_norm;
  GptqFactor factor;
  for (int i = 0; i < kNLinears; ++i) {
    stop();
    const LinearPlan& linear = plan[static_cast<size_t>(i)];
    const FloatMatrix& w = folded.linears[static_cast<size_t>(i)];
    const Gram* gram = grams ? &grams->at(kSiteOf[i]) : nullptr;
    const bool uses_factor = options.rounding == RoundingKind::kGptq && !linear.keep;
    // Linears of one site follow each other, so one factor is in memory at a time.
    const bool same_site = i > 0 && kSiteOf[i] == kSiteOf[i - 1];
    if (uses_factor && !same_site) {
      TQ_CHECK(gram);
      factor = factorize(*gram, options.threads, linear.name.c_str());
    }
    OwnedLinear& out = result.layer.linears[static_cast<size_t>(i)];
    const int64_t n_clipped =
        store_linear(w, linear, options, uses_factor ? &factor : nullptr, out);
    if (i == kWDown) out.input = folded.down_input;
    result.reports.push_back(measure_linear(linear.name, w, out, n_clipped, gram, options.threads));
  }
  return result;
}

}  // namespace tq
