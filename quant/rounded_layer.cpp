// rounded_layer - see rounded_layer.h.
#include "quant/rounded_layer.h"

#include <algorithm>
#include <cmath>

#include "cpu/autodiff_model.h"
#include "cpu/autodiff_ops.h"

namespace tq {
namespace {

// Weights are rounded to nearest while the basis is learned, with a clip near what the search of
// round_matrix() finds for Gaussian groups. GPTQ comes later, and a basis that was learned without
// any rounding of the weights serves it worse.
constexpr float kWeightClip = 0.95f;

// y diag(q, q, ..)^T: undoes fold_right().
Var unfold_right(const Var& y, const Var& q) {
  const int64_t n = q.shape().cols;
  return reshape(matmul_nt(reshape(y, {1, y.shape().size() / n, n}), q), y.shape());
}

}  // namespace

GroupRounding rounding_of(const ActQuant& act) {
  return {act.bits, act.group, act.codes, act.clip, act.two_level && act.bits < 8};
}

LayerContext::LayerContext(const Config& config, const Transform& down)
    : config(config), down(down) {
  rope.inv_freq = rope_inv_freq(config.rope, config.head_dim);
  rope.attention_factor = static_cast<float>(config.rope.attention_factor);
}

RoundedLayer::RoundedLayer(Tape& tape, const FloatLayer& layer, const LayerBases* bases,
                           const LayerContext& context, const QuantizeOptions& options)
    : tape_(tape),
      layer_(layer),
      context_(context),
      rounds_(bases != nullptr),
      rounds_input_(bases && options.bits_a < 16),
      weight_rounding_{std::min(options.bits_w, 8), options.group, ActCodes::kSymmetric,
                       kWeightClip},
      branch_rounding_{std::min(options.branch_bits, 8), options.group, ActCodes::kSymmetric,
                       kWeightClip},
      narrow_rounding_(rounding_of(ActQuant{
          .bits = options.bits_a, .codes = options.act_codes, .two_level = options.two_level}
                                       .narrow(options.rank, options.group))) {
  for (int i = 0; i < 4; ++i) {
    input_rounding_[i] = narrow_rounding_;
    input_rounding_[i].group = input_group(options, context.config, static_cast<Site>(i));
  }
  if (!bases) return;
  in_ = leaf(bases->in);
  mid_ = leaf(bases->mid);
  out_ = leaf(bases->out);
  heads_ = leaf(bases->heads);
}

Var RoundedLayer::constant(const FloatMatrix& m) const {
  return tape_.constant({1, m.rows, m.cols}, m.data.data());
}

Var RoundedLayer::leaf(const BasisLeaf& basis) const {
  const FloatMatrix& m = *basis.matrix;
  return tape_.parameter({1, m.rows, m.cols}, m.data.data(), basis.gradient);
}

Var RoundedLayer::input(Site site, const Var& x) const {
  if (!rounds_) return x;
  const Var turned = site == Site::kAttnIn    ? matmul_nn(x, in_)
                     : site == Site::kAttnOut ? fold_right(x, heads_)
                     : site == Site::kFfnIn   ? matmul_nn(x, mid_)
                                              : x;
  return rounds_input_ ? round_groups(turned, input_rounding_[static_cast<size_t>(site)]) : turned;
}

Var RoundedLayer::output(LinearIndex index, const Var& rounded, const BranchLeaf& branch) const {
  const Var w = constant(layer_.linears[static_cast<size_t>(index)]);
  if (!rounds_) return matmul_nt(rounded, w);
  const auto read = [&](const Var& columns) {
    switch (index) {
      case kWq:
      case kWk:
      case kWv:
        return matmul_nn(columns, in_);
      case kWo:
        return fold_right(columns, heads_);
      case kWGate:
      case kWUp:
        return matmul_nn(columns, mid_);
      default:
        return columns;
    }
  };
  const Var* writes = index == kWv      ? &heads_
                      : index == kWo    ? &mid_
                      : index == kWDown ? &out_
                                        : nullptr;
  const auto write = [&](const Var& rows) { return writes ? fold_left(rows, *writes) : rows; };
  Var y = matmul_nt(rounded, round_groups(write(read(w)), weight_rounding_));
  if (branch.factors) {
    const FloatMatrix &a = branch.factors->a, &b = branch.factors->b;
    const Var down = tape_.parameter({1, a.rows, a.cols}, a.data.data(), branch.gradient_a);
    const Var up = tape_.parameter({1, b.rows, b.cols}, b.data.data(), branch.gradient_b);
    Var h = matmul_nt(rounded, round_groups(read(down), branch_rounding_));
    if (rounds_input_) h = round_groups(h, narrow_rounding_);
    y = add(y, matmul_nt(h, round_groups(write(up), branch_rounding_)));
  }
  return writes ? unfold_right(y, *writes) : y;
}

Var RoundedLayer::powered(LinearIndex index, const Var& y) const {
  const std::vector<int8_t>& exponents = layer_.exponents[static_cast<size_t>(index)];
  return exponents.empty() ? y : scale(y, std::ldexp(1.0f, exponents.front()));
}

Var RoundedLayer::head_norm(const Var& x, const std::vector<float>& gain) const {
  const int64_t n = context_.config.head_dim;
  const Var heads = rms_norm(reshape(x, {1, x.shape().size() / n, n}), context_.config.norm_eps);
  return reshape(mul_row(heads, tape_.constant({1, 1, n}, gain.data())), x.shape());
}

Var RoundedLayer::attention(const Var& x, int64_t n_sequences) const {
  const Config& c = context_.config;
  const Var rounded = input(Site::kAttnIn, x);
  Var q = powered(kWq, output(kWq, rounded)), k = powered(kWk, output(kWk, rounded));
  const Var v = powered(kWv, output(kWv, rounded));
  if (c.has_qk_norm()) {
    q = head_norm(q, layer_.q_norm);
    k = head_norm(k, layer_.k_norm);
  }
  q = rope(q, context_.rope, c.n_heads, n_sequences);
  k = rope(k, context_.rope, c.n_kv_heads, n_sequences);
  const Var mixed = causal_attention(q, k, v, {c.n_heads, c.n_kv_heads, n_sequences});
  return powered(kWo, output(kWo, input(Site::kAttnOut, mixed)));
}

Var RoundedLayer::ffn(const Var& x) const {
  const Var rounded = input(Site::kFfnIn, x);
  Var hidden =
      silu_mul(powered(kWGate, output(kWGate, rounded)), powered(kWUp, output(kWUp, rounded)));
  if (context_.down.active()) hidden = hadamard(hidden, context_.down);
  return powered(kWDown, output(kWDown, input(Site::kFfnMid, hidden)));
}

}  // namespace tq
