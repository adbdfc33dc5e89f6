// span_kernel - the attention kernel on sixteen lanes. Shapes and definition: attention.cpp.
//
// Included by ops_avx2.cpp and ops_avx512.cpp after lane_kernels.h, never elsewhere.
//
// Work      a block of 64 keys at a time; six queries against 64 keys, softmax of the six rows,
// then
//           the six rows against the values. Scores run along keys, results along head_dim, so
//           neither needs a sum across lanes, and each element adds in the order of the plain loop.
// Memory    keys and values of a block: 32 KB at head_dim 64, used by all queries of the job
// Constants six queries x kWide vectors: 24 accumulators of 32 AVX-512 registers, 6 x 2 of 16 AVX2
// Error     none against plain_span: bit-identical (tests/test_cpu_attention.cpp)
#pragma once

#include "cpu/exp_constants.h"
#include "cpu/kernels.h"
#include "cpu/lane_kernels.h"

namespace tq {
namespace {

constexpr int kQueryTile = 6;

// One block, f32 or f16.
template <typename T>
struct BlockView {
  const T* keys;    // [head_dim, 64]
  const T* values;  // [64, padded_dim]
  int64_t head_dim, padded_dim;
};

Lanes load_cached(const float* p) {
  return Lanes::load(p);
}
Lanes load_cached(const uint16_t* p) {
  return Lanes::load_f16(p);
}

// scores[q, 0..63] = q . key, for kQueries queries.
template <int kQueries, typename T>
void score_tile(const BlockView<T>& block, const float* q, float* scores) {
  constexpr int kWide = Lanes::kWide;
  for (int64_t first = 0; first < kKeyBlock; first += kWide * kLanes) {
    Lanes sums[kQueries][kWide];
    for (int i = 0; i < kQueries; ++i) {
      for (int j = 0; j < kWide; ++j) sums[i][j] = Lanes::zero();
    }
    for (int64_t d = 0; d < block.head_dim; ++d) {
      Lanes keys[kWide];
      for (int j = 0; j < kWide; ++j) {
        keys[j] = load_cached(block.keys + d * kKeyBlock + first + j * kLanes);
      }
      for (int i = 0; i < kQueries; ++i) {
        const Lanes factor = Lanes::set(q[i * block.head_dim + d]);
        for (int j = 0; j < kWide; ++j) sums[i][j] = Lanes::fma(factor, keys[j], sums[i][j]);
      }
    }
    for (int i = 0; i < kQueries; ++i) {
      for (int j = 0; j < kWide; ++j) {
        sums[i][j].store(scores + i * kKeyBlock + first + j * kLanes);
      }
    }
  }
}

// out[q, :] (*= shrink) += sum over keys [begin, end) of p[q, key] * value[key, :], kWideNow
// vectors of the row from `column` on.
template <int kQueries, int kWideNow, typename T>
void value_columns(const BlockView<T>& block, const float* p, const float* shrink, int64_t begin,
                   int64_t end, int64_t column, float* out) {
  Lanes sums[kQueries][kWideNow];
  for (int i = 0; i < kQueries; ++i) {
    for (int j = 0; j < kWideNow; ++j) {
      sums[i][j] = Lanes::load(out + i * block.padded_dim + column + j * kLanes);
      if (shrink) sums[i][j] = sums[i][j] * Lanes::set(shrink[i]);
    }
  }
  for (int64_t key = begin; key < end; ++key) {
    Lanes values[kWideNow];
    for (int j = 0; j < kWideNow; ++j) {
      values[j] = load_cached(block.values + key * block.padded_dim + column + j * kLanes);
    }
    for (int i = 0; i < kQueries; ++i) {
      const Lanes weight = Lanes::set(p[i * kKeyBlock + key]);
      for (int j = 0; j < kWideNow; ++j) sums[i][j] = Lanes::fma(weight, values[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kQueries; ++i) {
    for (int j = 0; j < kWideNow; ++j) {
      sums[i][j].store(out + i * block.padded_dim + column + j * kLanes);
    }
  }
}

template <int kQueries, typename T>
void value_tile(const BlockView<T>& block, const float* p, const float* shrink, int64_t begin,
                int64_t end, float* out) {
  constexpr int kWide = Lanes::kWide;
  int64_t column = 0;
  for (; column + kWide * kLanes <= block.padded_dim; column += kWide * kLanes) {
    value_columns<kQueries, kWide>(block, p, shrink, begin, end, column, out);
  }
  for (; column < block.padded_dim; column += kLanes) {
    value_columns<kQueries, 1>(block, p, shrink, begin, end, column, out);
  }
}

// Scores of one query to weights exp(score - max) over its first n_keys keys, 0 behind them; max
// and the 16 partial sums are brought up to date. Returns exp(old max - new max).
float softmax_row(float* p, int64_t n_keys, float* max, float* partial_sums) {
  const Lanes lowest = Lanes::set(-kInfinity);
  constexpr int kVectors = kKeyBlock / kLanes;
  Lanes scores[kVectors];
  Lanes largest = lowest;
  for (int i = 0; i < kVectors; ++i) {
    scores[i] = Lanes::keep_first(Lanes::load(p + i * kLanes), n_keys - i * kLanes, lowest);
    largest = Lanes::max(largest, scores[i]);
  }
  const float block_max = largest.max_of_lanes();
  const float new_max = *max < block_max ? block_max : *max;
  const Lanes shrink = exp_lanes(Lanes::set(*max - new_max));
  *max = new_max;
  Lanes sums = Lanes::load(partial_sums) * shrink;
  for (int i = 0; i < kVectors; ++i) {
    const Lanes weight = exp_lanes(scores[i] - Lanes::set(new_max));
    weight.store(p + i * kLanes);
    sums = sums + weight;
  }
  sums.store(partial_sums);
  float factor;
  shrink.store_first(&factor, 1);
  return factor;
}

struct QueryState {
  const float* q;
  float *scores, *max, *partial_sums, *out;
};

// kQueries queries against one block; n_keys[i] of its keys are visible to query i, ascending.
template <int kQueries, typename T>
void block_tile(const BlockView<T>& block, const QueryState& state, const int64_t* n_keys) {
  float shrink[kQueries];
  score_tile<kQueries>(block, state.q, state.scores);
  for (int i = 0; i < kQueries; ++i) {
    shrink[i] = softmax_row(state.scores + i * kKeyBlock, n_keys[i], state.max + i,
                            state.partial_sums + i * kLanes);
  }
  // Keys that all of them see together, then each query's own last ones: a value behind a query's
  // position must not be touched, as 0 * infinity is not 0.
  value_tile<kQueries>(block, state.scores, shrink, 0, n_keys[0], state.out);
  for (int i = 1; i < kQueries; ++i) {
    if (n_keys[i] == n_keys[0]) continue;
    value_tile<1>(block, state.scores + i * kKeyBlock, nullptr, n_keys[0], n_keys[i],
                  state.out + i * block.padded_dim);
  }
}

template <typename T>
void block_queries(const BlockView<T>& block, const QueryState& state, const int64_t* n_keys,
                   int64_t count) {
  switch (count) {
    case 6:
      return block_tile<6>(block, state, n_keys);
    case 5:
      return block_tile<5>(block, state, n_keys);
    case 4:
      return block_tile<4>(block, state, n_keys);
    case 3:
      return block_tile<3>(block, state, n_keys);
    case 2:
      return block_tile<2>(block, state, n_keys);
    case 1:
      return block_tile<1>(block, state, n_keys);
  }
}

template <typename T>
BlockView<T> view_block(const SpanJob& job, int64_t block) {
  return {reinterpret_cast<const T*>(job.keys) + block * job.head_dim,
          reinterpret_cast<const T*>(job.values) + block * job.padded_dim, job.head_dim,
          job.padded_dim};
}

// The same block in `scratch` as f32: with many queries, converting once is cheaper.
BlockView<float> widen_block(const BlockView<uint16_t>& block, float* scratch) {
  float* values = scratch + kKeyBlock * block.head_dim;
  for (int64_t i = 0; i < kKeyBlock * block.head_dim; i += kLanes) {
    Lanes::load_f16(block.keys + i).store(scratch + i);
  }
  for (int64_t i = 0; i < kKeyBlock * block.padded_dim; i += kLanes) {
    Lanes::load_f16(block.values + i).store(values + i);
  }
  return {scratch, values, block.head_dim, block.padded_dim};
}

// Keys of a coded block as f32: value = code * scale + minimum in one fma. Lanes are keys.
void decode_keys(const SpanJob& job, int64_t block, float* to) {
  const int64_t rows = (job.head_dim * job.bits + 7) / 8;
  const std::byte* codes = job.keys + block * rows * kKeyBlock;
  const uint16_t* scales = job.scales + block * 4 * kKeyBlock;
  for (int64_t lane = 0; lane < kKeyBlock; lane += kLanes) {
    const Lanes scale = Lanes::load_f16(scales + lane);
    const Lanes minimum = Lanes::load_f16(scales + kKeyBlock + lane);
    for (int64_t d = 0; d < job.head_dim; ++d) {
      const Lanes code = job.bits == 8
                             ? Lanes::load_u8(codes + d * kKeyBlock + lane)
                             : Lanes::load_nibbles(codes + d / 2 * kKeyBlock + lane, d % 2);
      Lanes::fma(code, scale, minimum).store(to + d * kKeyBlock + lane);
    }
  }
}

// Values of a coded block as f32. Lanes are coordinates.
void decode_values(const SpanJob& job, int64_t block, float* to) {
  const std::byte* codes = job.values + block * kKeyBlock * job.padded_dim * job.bits / 8;
  const uint16_t* scales = job.scales + (block * 4 + 2) * kKeyBlock;
  float scale[kKeyBlock], minimum[kKeyBlock];
  for (int64_t lane = 0; lane < kKeyBlock; lane += kLanes) {
    Lanes::load_f16(scales + lane).store(scale + lane);
    Lanes::load_f16(scales + kKeyBlock + lane).store(minimum + lane);
  }
  for (int64_t key = 0; key < kKeyBlock; ++key) {
    const Lanes factor = Lanes::set(scale[key]), offset = Lanes::set(minimum[key]);
    for (int64_t d = 0; d < job.padded_dim; d += kLanes) {
      const int64_t at = key * job.padded_dim + d;
      // load_codes4 gives code - 8.
      const Lanes code = job.bits == 8 ? Lanes::load_u8(codes + at)
                                       : Lanes::load_codes4(codes + at / 2) + Lanes::set(8.0f);
      Lanes::fma(code, factor, offset).store(to + at);
    }
  }
}

// A block of codes in `scratch` as f32.
BlockView<float> decode_block(const SpanJob& job, int64_t key, float* scratch) {
  float* values = scratch + kKeyBlock * job.head_dim;
  decode_keys(job, key / kKeyBlock, scratch);
  decode_values(job, key / kKeyBlock, values);
  return {scratch, values, job.head_dim, job.padded_dim};
}

// All queries of the job that see something of the block of keys beginning at `key`.
template <typename T>
void visit_block(const SpanJob& job, const BlockView<T>& block, int64_t key, float* scores,
                 float* partial_sums) {
  int64_t first = key > job.first_pos ? (key - job.first_pos) * job.group_size : 0;
  while (first < job.n_queries) {
    const int64_t left = job.n_queries - first;
    const int64_t count = left < kQueryTile ? left : kQueryTile;
    int64_t n_keys[kQueryTile];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t visible = job.first_pos + (first + i) / job.group_size - key + 1;
      n_keys[i] = visible < kKeyBlock ? visible : kKeyBlock;
    }
    block_queries(block,
                  {job.q + first * job.head_dim, scores + first * kKeyBlock, job.max + first,
                   partial_sums + first * kLanes, job.out + first * job.padded_dim},
                  n_keys, count);
    first += count;
  }
}

void lanes_span(const SpanJob& job) {
  const int64_t last_pos = job.first_pos + (job.n_queries - 1) / job.group_size;
  const int64_t end = job.span_end < last_pos + 1 ? job.span_end : last_pos + 1;
  float* scores = job.scratch + kKeyBlock * (job.head_dim + job.padded_dim);
  float* partial_sums = scores + job.n_queries * kKeyBlock;
  for (int64_t i = 0; i < job.n_queries; ++i) {
    job.max[i] = -kInfinity;
    Lanes::zero().store(partial_sums + i * kLanes);
    for (int64_t d = 0; d < job.padded_dim; d += kLanes) {
      Lanes::zero().store(job.out + i * job.padded_dim + d);
    }
  }
  for (int64_t key = job.span_begin; key < end; key += kKeyBlock) {
    if (job.bits == 32) {
      visit_block(job, view_block<float>(job, key), key, scores, partial_sums);
    } else if (job.bits < 16) {
      visit_block(job, decode_block(job, key, job.scratch), key, scores, partial_sums);
    } else if (job.n_queries <= kQueryTile) {
      visit_block(job, view_block<uint16_t>(job, key), key, scores, partial_sums);
    } else {
      const BlockView<float> wide = widen_block(view_block<uint16_t>(job, key), job.scratch);
      visit_block(job, wide, key, scores, partial_sums);
    }
  }
  for (int64_t i = 0; i < job.n_queries; ++i) {
    job.sum[i] = Lanes::load(partial_sums + i * kLanes).sum();
  }
}

}  // namespace
}  // namespace tq
