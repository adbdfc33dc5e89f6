// autodiff_model - what a transformer has beside products and norms: embedding, rotary positions,
// causal attention, and the losses at its head.
//
// Rows are tokens: `n_sequences` texts of equal length, one after the other, each from position 0.
// Not here: the order in which a layer uses them (model/forward.cpp). Read next:
// autodiff_attention.cpp, autodiff_head.cpp.
#pragma once

#include <span>

#include "cpu/autodiff.h"
#include "model/backend.h"

namespace tq {

/// table [1, vocab, cols], tokens -> [1, n_tokens, cols]. Tokens are inside the table.
Var gather_rows(const Var& table, std::span<const int32_t> tokens);

/// x [batch, rows, n_heads * head_dim], every head turned by the angles of its row's position.
/// `table` as in model/backend.h; not kept.
Var rope(const Var& x, const RopeTable& table, int64_t n_heads, int64_t n_sequences);

struct AttentionShape {
  int64_t n_heads = 0, n_kv_heads = 0;  // n_heads / n_kv_heads queries share a key head
  int64_t n_sequences = 1;
};
/// q [1, rows, n_heads * head_dim], k and v [1, rows, n_kv_heads * head_dim] -> like q. Scale
/// 1 / sqrt(head_dim). Keeps q, k and v only; scores are computed again for the gradient.
Var causal_attention(const Var& q, const Var& k, const Var& v, const AttentionShape& shape);

/// Mean over rows of -log softmax(logits)[target]; one target a row, below the vocabulary's size.
/// The gradient takes the memory of the logits if no Var holds them any more.
Var cross_entropy(Var logits, std::span<const int32_t> targets);
/// Mean over rows of KL(softmax(reference) || softmax(logits)); reference needs no gradient.
Var kl(const Var& reference, Var logits);

/// The same for logits = hidden head^T, hidden [1, rows, dim], head [1, vocab, dim], in blocks of
/// rows: no more than a block of logits exists. Gradients are computed at once, so that backward()
/// only scales them.
Var head_cross_entropy(const Var& hidden, const Var& head, std::span<const int32_t> targets);
Var head_kl(const Var& reference_hidden, const Var& reference_head, const Var& hidden,
            const Var& head);

}  // namespace tq
