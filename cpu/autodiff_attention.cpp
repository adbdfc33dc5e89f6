// autodiff_attention - embedding, rotary positions and causal attention. See autodiff_model.h.
//
// attention - O = softmax(Q K^T / sqrt(head_dim), causal) V
// Shapes    Q, O [rows, n_heads * head_dim], K, V [rows, n_kv_heads * head_dim] f32
// Work      forward: an item is one head of one text; backward: one key head of one text with all
//           its queries, so that no two items add to the same gradient. 64 queries at a time
//           against the keys up to the last of them
// Memory    scores of 64 queries a thread, twice
// Error     tests/test_autodiff_model.cpp
// Source    D = rowsum(P dP) and the recomputed scores: FlashAttention (Dao et al. 2022)
#include <cmath>
#include <cstring>

#include "cpu/autodiff_model.h"
#include "cpu/autodiff_node.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "model/tensor.h"

namespace tq {

Var gather_rows(const Var& table, std::span<const int32_t> tokens) {
  const Shape shape = table.shape();
  TQ_CHECK(shape.batch == 1);
  const int64_t n_tokens = static_cast<int64_t>(tokens.size());
  Tensor value = new_tensor(table.tape(), {1, n_tokens, shape.cols});
  for (int64_t i = 0; i < n_tokens; ++i) {
    const int64_t token = tokens[static_cast<size_t>(i)];
    TQ_CHECK(token >= 0 && token < shape.rows);
    std::copy_n(table.data() + token * shape.cols, shape.cols, value.own() + i * shape.cols);
  }
  const int32_t node = table.node();
  const std::vector<int32_t> kept(tokens.begin(), tokens.end());
  return new_var(std::move(value), {&table}, [=](Tensor gradient, Gradients& out) {
    float* to = out.sum(node);
    for (size_t i = 0; i < kept.size(); ++i) {
      out.tape().kernels().add(to + kept[i] * shape.cols,
                               gradient.data() + static_cast<int64_t>(i) * shape.cols, shape.cols);
    }
  });
}

Var rope(const Var& x, const RopeTable& table, int64_t n_heads, int64_t n_sequences) {
  const Shape shape = x.shape();
  const int64_t n_rows = shape.batch * shape.rows, cols = shape.cols;
  const int64_t half = cols / n_heads / 2, length = shape.rows / n_sequences;
  TQ_CHECK(length * n_sequences == shape.rows && 2 * half * n_heads == cols &&
           static_cast<int64_t>(table.inv_freq.size()) == half);
  Tensor cos = new_tensor(x.tape(), {1, length, half}), sin = new_tensor(x.tape(), cos.shape());
  for (int64_t pos = 0; pos < length; ++pos) {
    rope_angles(pos, table.inv_freq.data(), half, table.attention_factor, cos.own() + pos * half,
                sin.own() + pos * half);
  }
  const auto turn = [=](const Tape& tape, const Tensor& cos, const Tensor& sin, float* heads) {
    parallel_ranges(tape, n_rows, 2 * cols, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * n_heads; i < end * n_heads; ++i) {
        const int64_t at = i / n_heads % length * half;
        tape.kernels().rope(heads + i * 2 * half, cos.data() + at, sin.data() + at, half);
      }
    });
  };
  Tensor value = new_tensor(x.tape(), shape);
  std::memcpy(value.own(), x.data(), static_cast<size_t>(value.size()) * sizeof(float));
  turn(x.tape(), cos, sin, value.own());
  // The transpose turns the other way (attention_factor multiplies both).
  for (int64_t i = 0; i < sin.size(); ++i) sin.own()[i] = -sin.own()[i];
  const int32_t node = x.node();
  return new_var(std::move(value), {&x}, [=](Tensor gradient, Gradients& out) {
    Tensor dx = own_tensor(out.tape(), std::move(gradient));
    turn(out.tape(), cos, sin, dx.own());
    out.add(node, std::move(dx));
  });
}

namespace {

constexpr int64_t kQueryBlock = 64;

// Sizes of one call; all offsets follow from the index of a text and of a head.
struct Attention {
  int64_t n_heads, n_kv_heads, n_texts, length, head_dim;
  float factor;

  int64_t q_cols() const { return n_heads * head_dim; }
  int64_t kv_cols() const { return n_kv_heads * head_dim; }
  int64_t group_size() const { return n_heads / n_kv_heads; }
  int64_t q_offset(int64_t text, int64_t head) const {
    return text * length * q_cols() + head * head_dim;
  }
  int64_t kv_offset(int64_t text, int64_t kv_head) const {
    return text * length * kv_cols() + kv_head * head_dim;
  }
};

// Of one thread.
struct AttentionScratch {
  AlignedBuffer gemm, scores, slopes;
  explicit AttentionScratch(const Attention& a)
      : gemm(static_cast<size_t>(std::max(
                 {gemm_scratch(a.length, a.head_dim), gemm_scratch(a.head_dim, a.length)})) *
             sizeof(float)),
        scores(static_cast<size_t>(kQueryBlock * a.length) * sizeof(float)),
        slopes(scores.size()) {}
};

// A matrix with rows `stride` apart; `transposed` reads it the other way.
struct Strided {
  const float* data;
  int64_t stride;
  bool transposed = false;
};

// c [rows, cols] (+)= a b
void multiply(const Kernels& kernels, Strided a, Strided b, float* c, int64_t c_row, int64_t rows,
              int64_t cols, int64_t depth, bool accumulate, AttentionScratch& scratch) {
  kernels.gemm({a.data, a.transposed ? 1 : a.stride, a.transposed ? a.stride : 1, b.data,
                b.transposed ? 1 : b.stride, b.transposed ? b.stride : 1, c, c_row, rows, cols,
                depth, accumulate, scratch.gemm.as<float>()});
}

// Weights of queries [first, first + count) over keys [0, first + count), [count, length] in
// scratch.scores; 0 behind a query's own position.
void weights_of(const Kernels& kernels, const Attention& a, const float* q, const float* k,
                int64_t first, int64_t count, AttentionScratch& scratch) {
  float* scores = scratch.scores.as<float>();
  multiply(kernels, {q + first * a.q_cols(), a.q_cols()}, {k, a.kv_cols(), true}, scores, a.length,
           count, first + count, a.head_dim, false, scratch);
  for (int64_t i = 0; i < count; ++i) {
    float* row = scores + i * a.length;
    const int64_t n_keys = first + i + 1;
    float largest = row[0];
    for (int64_t j = 0; j < n_keys; ++j) largest = std::max(largest, row[j]);
    for (int64_t j = 0; j < n_keys; ++j) row[j] = (row[j] - largest) * a.factor;
    const float inverse = 1.0f / kernels.exp_sum(row, 0.0f, n_keys);
    for (int64_t j = 0; j < n_keys; ++j) row[j] *= inverse;
    for (int64_t j = n_keys; j < first + count; ++j) row[j] = 0.0f;
  }
}

void forward_head(const Kernels& kernels, const Attention& a, const float* q, const float* k,
                  const float* v, float* o, AttentionScratch& scratch) {
  for (int64_t first = 0; first < a.length; first += kQueryBlock) {
    const int64_t count = std::min(kQueryBlock, a.length - first);
    weights_of(kernels, a, q, k, first, count, scratch);
    multiply(kernels, {scratch.scores.as<float>(), a.length}, {v, a.kv_cols()},
             o + first * a.q_cols(), a.q_cols(), count, a.head_dim, first + count, false, scratch);
  }
}

struct HeadGradients {
  float *dq, *dk, *dv;  // added to; null where not wanted
};

void backward_head(const Kernels& kernels, const Attention& a, const float* q, const float* k,
                   const float* v, const float* d_o, const HeadGradients& to,
                   AttentionScratch& scratch) {
  const float* p = scratch.scores.as<float>();
  float* ds = scratch.slopes.as<float>();
  for (int64_t first = 0; first < a.length; first += kQueryBlock) {
    const int64_t count = std::min(kQueryBlock, a.length - first), n_keys = first + count;
    const int64_t at = first * a.q_cols();
    weights_of(kernels, a, q, k, first, count, scratch);
    if (to.dv) {  // dV += P^T dO
      multiply(kernels, {p, a.length, true}, {d_o + at, a.q_cols()}, to.dv, a.kv_cols(), n_keys,
               a.head_dim, count, true, scratch);
    }
    if (!to.dq && !to.dk) continue;
    // dP = dO V^T, dS = P (dP - rowsum(P dP)) / sqrt(head_dim)
    multiply(kernels, {d_o + at, a.q_cols()}, {v, a.kv_cols(), true}, ds, a.length, count, n_keys,
             a.head_dim, false, scratch);
    for (int64_t i = 0; i < count; ++i) {
      float* slopes = ds + i * a.length;
      const float* weights = p + i * a.length;
      double dot = 0;
      for (int64_t j = 0; j < n_keys; ++j) dot += double{weights[j]} * double{slopes[j]};
      for (int64_t j = 0; j < n_keys; ++j) {
        slopes[j] = weights[j] * (slopes[j] - static_cast<float>(dot)) * a.factor;
      }
    }
    if (to.dq) {
      multiply(kernels, {ds, a.length}, {k, a.kv_cols()}, to.dq + at, a.q_cols(), count, a.head_dim,
               n_keys, true, scratch);
    }
    if (to.dk) {
      multiply(kernels, {ds, a.length, true}, {q + at, a.q_cols()}, to.dk, a.kv_cols(), n_keys,
               a.head_dim, count, true, scratch);
    }
  }
}

// fn(item, scratch) for every item.
template <typename Function>
void for_items(const Tape& tape, const Attention& a, int64_t n_items, const Function& fn) {
  PerWorker<AttentionScratch> scratch(tape.n_threads());
  parallel_items(tape.n_threads(), n_items,
                 [&](int64_t item, int worker) { fn(item, scratch.get(worker, a)); });
}

}  // namespace

Var causal_attention(const Var& q, const Var& k, const Var& v, const AttentionShape& shape) {
  const Shape qs = q.shape(), ks = k.shape();
  Attention a = {};
  a.n_heads = shape.n_heads;
  a.n_kv_heads = shape.n_kv_heads;
  a.n_texts = shape.n_sequences;
  a.length = qs.rows / shape.n_sequences;
  a.head_dim = qs.cols / shape.n_heads;
  a.factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(a.head_dim)));
  TQ_CHECK(qs.batch == 1 && ks.batch == 1 && ks == v.shape() && ks.rows == qs.rows &&
           a.length * a.n_texts == qs.rows && a.q_cols() == qs.cols && a.kv_cols() == ks.cols &&
           a.n_heads % a.n_kv_heads == 0);
  Tensor value = new_tensor(q.tape(), qs);
  for_items(q.tape(), a, a.n_texts * a.n_heads, [&](int64_t item, AttentionScratch& scratch) {
    const int64_t text = item / a.n_heads, head = item % a.n_heads;
    const int64_t at = a.q_offset(text, head), kv_at = a.kv_offset(text, head / a.group_size());
    forward_head(q.tape().kernels(), a, q.data() + at, k.data() + kv_at, v.data() + kv_at,
                 value.own() + at, scratch);
  });
  const int32_t q_node = q.node(), k_node = k.node(), v_node = v.node();
  const Tensor kept_q = q.value(), kept_k = k.value(), kept_v = v.value();
  return new_var(std::move(value), {&q, &k, &v}, [=](Tensor gradient, Gradients& out) {
    float* dq = q_node == kNoNode ? nullptr : out.sum(q_node);
    float* dk = k_node == kNoNode ? nullptr : out.sum(k_node);
    float* dv = v_node == kNoNode ? nullptr : out.sum(v_node);
    for_items(
        out.tape(), a, a.n_texts * a.n_kv_heads, [&](int64_t item, AttentionScratch& scratch) {
          const int64_t text = item / a.n_kv_heads, kv_head = item % a.n_kv_heads;
          const int64_t kv_at = a.kv_offset(text, kv_head);
          for (int64_t i = 0; i < a.group_size(); ++i) {
            const int64_t at = a.q_offset(text, kv_head * a.group_size() + i);
            backward_head(
                out.tape().kernels(), a, kept_q.data() + at, kept_k.data() + kv_at,
                kept_v.data() + kv_at, gradient.data() + at,
                {dq ? dq + at : nullptr, dk ? dk + kv_at : nullptr, dv ? dv + kv_at : nullptr},
                scratch);
          }
        });
  });
}

}  // namespace tq
